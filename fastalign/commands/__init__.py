"""The subcommands. Each is one module with one function; this file lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .ablate import ablate
from .analyze import analyze
from .bench import bench
from .cache import cache
from .check import check
from .distill import distill
from .eval import evaluate
from .init import init
from .prune import prune
from .recipes import recipes


def build_app() -> typer.Typer:
    """The command-line application."""
    app = typer.Typer(
        name="fastalign",
        help="Attention alignment without the attention matrix. Exit code 0: done; 1: it failed, the "
        "last line says why; 2: the command line was wrong.",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_options)
    app.command()(recipes)
    app.command()(init)
    app.command()(check)
    app.command()(cache)
    app.command()(distill)
    app.command(name="eval")(evaluate)
    app.command()(analyze)
    app.command()(ablate)
    app.command()(prune)
    app.command()(bench)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options of the command itself."""
