"""``fastalign cache``: the teacher's targets, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ._bars import progress_bars


def cache(
    recipe: Annotated[Path, typer.Argument(help="A YAML file whose models have a cache.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Print sizes and free space, record nothing.")
    ] = False,
) -> None:
    """Run the teacher over a recipe's data once; `fastalign distill` then reads its targets instead.

    The recipe has `models: {cache: {path: FOLDER, top_k: 64, entries: null, dtype: bfloat16}}`. For each
    stage whose losses need the teacher: the top_k likeliest tokens at the answers' positions with the mass
    of the rest, and the attention maps of the matched layers. The size is estimated and compared with the
    free space first. A recording that was cut off goes on; a finished one has its checksums compared. Runs
    in one process.

    Exit code 0: recorded, or there and whole; 1: no space, damage, another recording in the folder, models
    or data that fail; 2: a wrong recipe.
    """
    from ..distill.data.conversation import TemplateError
    from ..distill.data.records import SampleError, SourceError
    from ..distill.plain import RecipeError
    from ..distill.recipe import load_recipe

    try:
        read = load_recipe(recipe)
    except RecipeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if read.models.cache is None:
        typer.echo(f"{recipe} has no models.cache; allowed: {{path: FOLDER, ...}}", err=True)
        raise typer.Exit(2)
    from ..distill.recording import record_recipe

    try:
        record_recipe(read, plan=plan, say=typer.echo, bar=_bar)
    except RecipeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except (SampleError, SourceError, TemplateError, OSError, ValueError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, told how many of how many samples are done."""
    with progress_bars() as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
