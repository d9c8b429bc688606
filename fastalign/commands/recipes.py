"""``fastalign recipes``: the named objectives."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..spec import RECIPES, AlignSpec, Recipe


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show one recipe in full: every field and its source.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable: a JSON object by name.")
    ] = False,
) -> None:
    """List the named objectives: what each compares, how it normalises, and where it comes from.

    Any of them is a value for spec= in fused_attn_align_loss and in AttentionAlignment; fields can be
    changed with dataclasses.replace(RECIPES[name].spec, ...).
    """
    if name is not None and name not in RECIPES:
        typer.echo(f"no recipe {name!r}; allowed: {', '.join(RECIPES)}", err=True)
        raise typer.Exit(2)
    chosen = list(RECIPES.values()) if name is None else [RECIPES[name]]
    if as_json:
        typer.echo(json.dumps({r.name: _plain(r) for r in chosen}, indent=2))
    elif name is None:
        Console().print(_overview(chosen))
    else:
        Console().print(_details(chosen[0]))


def _plain(recipe: Recipe) -> dict[str, object]:
    return {"summary": recipe.summary, "source": recipe.source, "spec": recipe.spec.to_dict()}


def _overview(chosen: list[Recipe]) -> Table:
    table = Table(title="Recipes", pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("compares")
    table.add_column("rows x columns", no_wrap=True)
    for recipe in chosen:
        spec = recipe.spec
        compares = f"{spec.divergence} per {spec.compare}, heads {spec.heads}, {spec.normalize}"
        if spec.sink_sigma is not None:
            compares += f", sinks above {spec.sink_sigma:g} std dropped"
        table.add_row(recipe.name, compares, f"{spec.rows} x {spec.columns}")
    table.caption = "fastalign recipes NAME shows every field and the source"
    return table


def _details(recipe: Recipe) -> Table:
    table = Table(
        title=f"{recipe.name}: {recipe.summary}", caption=recipe.source, title_justify="left"
    )
    table.add_column("field")
    table.add_column("value")
    table.add_column("default")
    default = AlignSpec().to_dict()
    for field, value in recipe.spec.to_dict().items():
        mark = "bold" if value != default[field] else "dim"
        table.add_row(field, f"[{mark}]{value}[/{mark}]", str(default[field]))
    return table
