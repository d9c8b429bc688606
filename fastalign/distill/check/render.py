"""An outcome as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..memory.render import plan_table
from .outcome import Outcome, size_text

#: Bad samples that are printed; all are counted, and all are in the report.
SHOWN = 20
_STYLES = {"ok": "green", "problems": "bold red", "left out": "yellow"}


def print_outcome(outcome: Outcome, console: Console, *, plans: bool = False) -> None:
    """Layers, data, memory, dry steps, and at the end the summary and what must be mended.

    Args:
        plans: also every line of the memory plans.
    """
    facts = {part.name: part.facts for part in outcome.parts}
    for table in (
        _layers(facts.get("stages", {})),
        _data(facts.get("data", {})),
        _tokens(facts.get("data", {})),
        _memory(facts.get("memory", {})),
        _dry(facts.get("dry step", {})),
    ):
        if table is not None and table.row_count:
            console.print(table, "")
    for plan in outcome.plans if plans else ():
        device = facts["memory"]["device"]
        console.print(plan_table(plan, device["bytes"], device["name"]), "")
    console.print(_summary(outcome))
    for part in outcome.parts:
        for note in part.notes:
            console.print(f"note: {escape(note)}", style="yellow", soft_wrap=True)
    bad = len(facts.get("data", {}).get("bad_samples", ()))
    for part in outcome.parts:
        whole = part.problems[: len(part.problems) - bad] if part.name == "data" else part.problems
        for problem in whole:
            console.print(f"PROBLEM: {escape(problem)}", style="red", soft_wrap=True)
        if part.name == "data" and bad:
            console.print(f"PROBLEM: {bad:,} bad samples:", style="red")
            for problem in part.problems[len(whole) :][:SHOWN]:
                console.print(f"  {escape(problem)}", style="red", soft_wrap=True)
            if bad > SHOWN:
                console.print(f"  and {bad - SHOWN:,} more; --report FILE writes all", style="red")


def _table(title: str, *columns: str) -> Table:
    """Columns that end in ``#`` hold numbers."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.rstrip("#"), justify="right" if name.endswith("#") else "left")
    return table


def _layers(facts: dict[str, Any]) -> Table:
    """Stages that match the same layers share their lines."""
    table = _table("matched layers (0-based)", "stages", "student layer#", "teacher layers")
    groups: dict[str, tuple[list[str], dict[str, list[int]]]] = {}
    for name, stage in facts.get("stages", {}).items():
        if stage["matched_layers"]:
            key = str(stage["matched_layers"])
            groups.setdefault(key, ([], stage["matched_layers"]))[0].append(name)
    for names, matching in groups.values():
        for student, teachers in matching.items():
            table.add_row(", ".join(names), student, ", ".join(map(str, teachers)))
    return table


def _data(facts: dict[str, Any]) -> Table:
    columns = ("samples#", "bad#", "text-only#", "truncated#")
    table = _table("data", "stages", *columns)
    for source in facts.get("sources", ()):
        counts = (source[name] for name in ("looked_at", "bad", "text_only", "truncated"))
        table.add_row(", ".join(source["stages"]), *(f"{count:,}" for count in counts))
    return table


def _tokens(facts: dict[str, Any]) -> Table:
    table = _table("tokens of a good sample", "stages", "of", "median#", "95 %#", "most#")
    for source in facts.get("sources", ()):
        for kind in ("text_tokens", "visual_tokens", "labelled_tokens", "tokens"):
            numbers = (f"{value:,}" for value in source[kind].values())
            name = {"visual_tokens": "image (where there is one)", "tokens": "all"}.get(
                kind, kind.removesuffix("_tokens")
            )
            table.add_row(", ".join(source["stages"]), name, *numbers)
    return table


def _memory(facts: dict[str, Any]) -> Table:
    table = _table(
        "memory at the longest samples",
        "stage",
        "batch#",
        "tokens#",
        "of images#",
        "needs#",
        "verdict",
    )
    for name, stage in facts.get("stages", {}).items():
        table.add_row(
            name,
            f"{stage['batch']:,}",
            f"{stage['tokens']:,}",
            f"{stage['visual']:,}",
            size_text(stage["bytes"]),
            "fits" if stage["fits"] else "DOES NOT FIT",
        )
    return table


def _dry(facts: dict[str, Any]) -> Table:
    table = _table(
        "dry step: losses, and the gradients' norms", "stage", "term", "value#", "gradient of"
    )
    for name, stage in facts.get("stages", {}).items():
        for term, value in stage["terms"].items():
            norms = stage["gradients"].get(term, stage["gradients"]["all"])
            reached = ", ".join(f"{part} {norm:.3g}" for part, norm in norms.items())
            table.add_row(name, term, f"{value:.4g}", reached)
    return table


def _summary(outcome: Outcome) -> Table:
    table = _table(f"check of {outcome.recipe}", "part", "verdict", "what was found")
    for part in outcome.parts:
        found = part.left_out if part.verdict == "left out" else part.summary
        verdict = f"{len(part.problems):,} problems" if part.problems else part.verdict
        if len(part.problems) == 1:
            verdict = "1 problem"
        table.add_row(part.name, f"[{_STYLES[part.verdict]}]{verdict}[/]", escape(found))
    return table
