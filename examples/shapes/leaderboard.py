"""The leaderboard of the shapes world, from the records of a study.

python -m examples.shapes.leaderboard
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastalign.ablation.records import read_records
from fastalign.ablation.report import summarise
from fastalign.ablation.study import load_study
from fastalign.ablation.task import find_task

COLUMNS = ("composition", "pairs", "recognise")


def leaderboard(study_file: Path) -> str:
    """Markdown: conditions by their first measure, best first."""
    study = load_study(study_file)
    records = read_records(study, find_task(study))
    runs = {name: {r.seed: r for r in records if r.condition == name} for name in study.conditions}
    found = summarise(study, runs)["conditions"]
    lines = [
        "# Leaderboard of the shapes world",
        "",
        f"Made by `python -m examples.shapes.leaderboard` from the records of study `{study.name}`; do not "
        "edit. Means over the seeds that are finished; rows with few seeds may change places.",
        "",
        "| condition | seeds | " + " | ".join(COLUMNS) + " | CPU s a run |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    order = sorted(found, key=lambda name: -found[name]["measures"][COLUMNS[0]]["mean"])
    for name in order:
        entry = found[name]
        cells = [f"{entry['measures'][c]['mean']:.3f}" for c in COLUMNS]
        cells.append(f"{entry['cpu_seconds']['mean']:.0f}")
        lines.append(f"| {name} | {len(entry['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("evidence/shapes/study/study.yaml"))
    parser.add_argument("--out", type=Path, default=Path("evidence/leaderboard.md"))
    arguments = parser.parse_args()
    arguments.out.write_text(leaderboard(arguments.study))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
