"""Accuracy on the shapes world of the students that runs of ``shapes.yaml`` made.

    python -m examples.recipes.shapes_scores out/shapes/run out/shapes/control

Each run is a recipe's output folder; its ``final`` is scored beside the shipped teacher. Questions come
from held-out scenes, and are the same for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import fastalign.distill.taf  # noqa: F401  (makes AutoModel know its checkpoints)
from examples.shapes.demo import console, load_teacher, score, score_table
from fastalign.evals.shapes.dataset import evaluation_set
from fastalign.evals.shapes.scoring import Report


def score_runs(runs: list[Path], per_type: int) -> dict[str, Report]:
    """Reports of the teacher and of each run's student; each run's is kept in its ``scores.json``."""
    test = evaluation_set("test", per_type)
    reports = {"teacher": score(load_teacher(), test, "teacher")}
    for run in runs:
        student = AutoModelForImageTextToText.from_pretrained(
            run / "final", local_files_only=True, dtype=torch.float32
        )
        reports[run.name] = score(student, test, run.name)
        (run / "scores.json").write_text(json.dumps(reports[run.name].as_dict(), indent=2) + "\n")
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores of the students that shapes.yaml made.")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of recipes")
    parser.add_argument("--per-type", type=int, default=200, help="test questions per type")
    arguments = parser.parse_args()
    for run in arguments.runs:
        if not (run / "final").is_dir():
            parser.error(f"{run} has no final/; allowed: output folders of finished runs")
    console.print(score_table(score_runs(arguments.runs, arguments.per_type)))


if __name__ == "__main__":
    main()
