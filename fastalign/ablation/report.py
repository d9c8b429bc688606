"""What a study has found: ``table.md``, ``table.json`` and ``curves.png`` beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from .records import Record, write_json
from .statistics import LEVEL, RESAMPLES, Difference, Estimate, estimate, paired, reached
from .study import Study

Runs = dict[str, dict[int, Record]]


def write_report(study: Study, records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the three files (no curves without matplotlib or without runs); returns their paths."""
    runs: Runs = {name: {} for name in study.conditions}
    for record in records:
        runs[record.condition][record.seed] = record
    found = summarise(study, runs)
    text, plain = folder / "table.md", folder / "table.json"
    folder.mkdir(parents=True, exist_ok=True)
    part = text.with_name(text.name + ".part")
    part.write_text(markdown(study, found))
    os.replace(part, text)
    write_json(plain, found)
    written = [text, plain]
    if records:
        try:
            from .curves import curves_figure, save_figure
        except ImportError:
            return written
        written.append(save_figure(curves_figure(study, runs), folder / "curves.png"))
    return written


def summarise(study: Study, runs: Runs) -> dict[str, Any]:
    """Plain values: estimates of each measure by condition, paired differences, thresholds, costs."""
    conditions = {}
    for name, seeds in runs.items():
        if not seeds:
            continue
        conditions[name] = {
            "seeds": sorted(seeds),
            "measures": {
                m: asdict(estimate([r.final[m] for r in seeds.values()])) for m in study.measures
            },
            "cpu_seconds": asdict(estimate([r.cpu_seconds for r in seeds.values()])),
            "reached": {str(t): _reached(study, seeds, t) for t in study.thresholds},
        }
    differences = []
    for ours, baseline in study.compare:
        for measure in study.measures:
            values = [
                {s: r.final[measure] for s, r in runs[name].items()} for name in (ours, baseline)
            ]
            found = paired(*values)
            if found is not None:
                differences.append(
                    {
                        "condition": ours,
                        "baseline": baseline,
                        "measure": measure,
                        "positive": found.positive,
                        **asdict(found.estimate),
                    }
                )
    return {
        "study": study.name,
        "runs": sum(len(seeds) for seeds in runs.values()),
        "runs_planned": len(study.runs()),
        "conditions": conditions,
        "differences": differences,
    }


def _reached(study: Study, seeds: dict[int, Record], threshold: float) -> dict[str, Any]:
    """In how many runs, and mean step and CPU seconds of those."""
    entries = []
    for record in seeds.values():
        index = reached(record.curve, study.measures[0], threshold)
        if index is not None:
            entries.append(record.curve[index])
    return {
        "runs": len(entries),
        "of": len(seeds),
        "step": fmean(e["step"] for e in entries) if entries else None,
        "cpu_seconds": fmean(e["cpu_seconds"] for e in entries) if entries else None,
    }


# ------------------------------------------------------------------------------- text


def markdown(study: Study, found: dict[str, Any]) -> str:
    """The table file's text."""
    lines = [
        f"# Study {study.name}",
        "",
        f"{found['runs']} of {found['runs_planned']} runs are finished. Made by "
        "`fastalign ablate STUDY --table` from the records in "
        f"`{study.records}/`; do not edit.",
        "",
    ]
    if study.note:
        lines += [study.note.strip(), ""]
    lines += [
        f"Mean over seeds, and the {LEVEL:.0%} percentile bootstrap interval of the mean ({RESAMPLES:,} "
        "resamples, fixed seed). With five seeds such an interval is too narrow: read it as the spread "
        "of what was seen.",
        "",
        _row("condition", "seeds", *study.measures, "CPU s a run"),
        _row("---", *["---:"] * (len(study.measures) + 2)),
    ]
    for name, entry in found["conditions"].items():
        lines.append(
            _row(
                name,
                str(len(entry["seeds"])),
                *(_interval(Estimate(**entry["measures"][m])) for m in study.measures),
                f"{entry['cpu_seconds']['mean']:.0f}",
            )
        )
    if found["differences"]:
        lines += ["", "Differences paired by seed (condition minus baseline):", ""]
        lines += [
            _row("condition", "baseline", "measure", "difference", "seeds above 0"),
            _row("---", "---", "---", "---:", "---:"),
        ]
        lines += [_difference(entry) for entry in found["differences"]]
    if study.thresholds and found["conditions"]:
        lines += ["", *_thresholds(study, found)]
    return "\n".join(lines) + "\n"


def _difference(entry: dict[str, Any]) -> str:
    values = {k: entry[k] for k in ("mean", "deviation", "low", "high", "count")}
    difference = Difference(Estimate(**values), entry["positive"])
    return _row(
        entry["condition"],
        entry["baseline"],
        entry["measure"],
        _interval(difference.estimate, sign=True),
        f"{difference.positive} of {difference.estimate.count}",
    )


def _thresholds(study: Study, found: dict[str, Any]) -> list[str]:
    lines = [
        f"When `{study.measures[0]}` on the scenes scored along the way first reaches a value (mean step "
        f"and CPU seconds of training over the runs that do; scored every {study.score_every} steps):",
        "",
        _row("condition", *(f"{t:g}" for t in study.thresholds)),
        _row("---", *["---:"] * len(study.thresholds)),
    ]
    for name, entry in found["conditions"].items():
        cells = []
        for t in study.thresholds:
            at = entry["reached"][str(t)]
            cells.append(
                f"step {at['step']:.0f}, {at['cpu_seconds']:.0f} s ({at['runs']} of {at['of']})"
                if at["runs"]
                else f"never (0 of {at['of']})"
            )
        lines.append(_row(name, *cells))
    return lines


def _interval(value: Estimate, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    if value.count == 1:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
