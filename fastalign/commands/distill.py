"""``fastalign distill``: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def distill(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; `fastalign init` writes one.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the recipe's output folder.")
    ] = False,
) -> None:
    """Distil a student: run the stages that a recipe lists.

    On several devices: accelerate launch -m fastalign distill RECIPE. Ctrl-C and crashes lose the
    steps since the last checkpoint; --resume goes on.
    """
    from ..distill.data.conversation import TemplateError
    from ..distill.data.records import SampleError, SourceError
    from ..distill.plain import RecipeError
    from ..distill.recipe import load_recipe, resolve

    try:
        read = load_recipe(recipe)
    except RecipeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    from ..distill.checkpoints import SaveError
    from ..distill.run import is_main, leave_processes, run_recipe

    try:
        run_recipe(read, resume=resume, say=typer.echo if is_main() else _silent)
    except RecipeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except (SaveError, SampleError, SourceError, TemplateError, OSError, ValueError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if is_main():
        typer.echo(f"the student is in {resolve(read, read.output) / 'final'}")
    leave_processes()


def _silent(text: str) -> None:
    pass
