"""Distil a student on the shapes world and look at what it learned to look at.

    make demo          (or: python -m examples.shapes.demo)

Loads the shipped teacher, builds a smaller student with random weights, trains it for a few
minutes on two CPU cores with next-token loss, logit distillation and attention alignment, and
shows accuracy per question type and the similarity of the two models' attention, before and after.
Pictures and numbers go to ``out/demo/``. ``--align-weight 0`` is the control: everything else
equal, no alignment.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from examples.shapes.student import History, StudentSettings, draw_inputs, similarity, train_student
from fastalign.analysis.pictures import (
    Example,
    Look,
    attention_figure,
    curves_figure,
    save_figure,
)
from fastalign.evals.shapes.dataset import EvaluationSet, Item, evaluation_set
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.questions import TYPES, chance
from fastalign.evals.shapes.render import render
from fastalign.evals.shapes.scoring import Report, composition_chance, evaluate
from fastalign.evals.shapes.tokenizer import IMAGE, build_processor
from fastalign.models import visual_attention

TEACHER = Path(__file__).parent / "teacher"
SHOWN = ("where", "binding", "relation", "neighbour", "count")
"""The question types of the attention picture."""

console = Console()


def load_teacher(folder: Path = TEACHER) -> LlavaForConditionalGeneration:
    """The shipped teacher, from local files only."""
    teacher: LlavaForConditionalGeneration = LlavaForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    teacher.eval()
    return teacher


def run(
    settings: StudentSettings, out: Path, *, per_type: int, teacher_folder: Path
) -> dict[str, Any]:
    """The whole demo; returns what it writes to results.json."""
    teacher = load_teacher(teacher_folder)
    student = build_student(settings.seed, teacher)
    before = copy.deepcopy(student)
    sizes = [
        sum(p.numel() for p in m.model.language_model.parameters()) for m in (teacher, student)
    ]
    console.print(f"decoders: teacher {sizes[0]:,} parameters, student {sizes[1]:,}")

    test = evaluation_set("test", per_type, seed=settings.seed)
    reports = {"teacher": score(teacher, test, "teacher")}
    reports["student before"] = score(student, test, "student before")
    probe = draw_inputs(settings, settings.steps)  # a batch that training never draws
    alike = {"before": similarity(student, teacher, probe)}

    started = time.monotonic()
    history = train_with_progress(student, teacher, settings)
    minutes = (time.monotonic() - started) / 60

    reports["student after"] = score(student, test, "student after")
    alike["after"] = similarity(student, teacher, probe)
    console.print(score_table(reports))
    console.print(similarity_table(alike))
    console.print(f"trained {settings.steps} steps in {minutes:.1f} minutes")

    models = {"teacher": teacher, "student before": before, "student after": student}
    written = [
        save_figure(attention_picture(models, test), out / "attention.png"),
        save_figure(curves(history), out / "curves.png"),
    ]
    results = {
        "settings": vars(settings),
        "minutes": minutes,
        "accuracy": {name: report.as_dict() for name, report in reports.items()},
        "similarity": alike,
        "history": vars(history),
    }
    written.append(write_json(results, out / "results.json"))
    student.save_pretrained(out / "student")
    build_processor().save_pretrained(out / "student")
    written.append(out / "student")
    console.print("wrote " + ", ".join(str(path) for path in written))
    return results


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def score(model: LlavaForConditionalGeneration, test: EvaluationSet, name: str) -> Report:
    with bar() as progress:
        task = progress.add_task(f"asking the {name}", total=None)
        return evaluate(
            model,
            test,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def train_with_progress(
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    settings: StudentSettings,
) -> History:
    with bar() as progress:
        task = progress.add_task("training", total=settings.steps)

        def show(step: int, history: History) -> None:
            losses = f"lm {history.lm[-1]:.3f}  kd {history.kd[-1]:.3f}  align {history.alignment[-1]:.3f}"
            progress.update(task, completed=step, description=f"training  {losses}")

        return train_student(student, teacher, settings, progress=show)


# --- tables and pictures --------------------------------------------------------------------------


def score_table(reports: dict[str, Report]) -> Table:
    table = Table(title="accuracy on test scenes", title_justify="left")
    table.add_column("question type")
    for name in ("chance", *reports):
        table.add_column(name, justify="right")
    for type in TYPES:
        values = [chance(type), *(report.types[type].accuracy for report in reports.values())]
        table.add_row(type, *(f"{value:.3f}" for value in values))
    values = [composition_chance(), *(report.composition for report in reports.values())]
    table.add_section()
    table.add_row("composition score", *(f"{value:.3f}" for value in values), style="bold")
    return table


def similarity_table(alike: dict[str, dict[str, float]]) -> Table:
    table = Table(
        title="similarity (cosine) of teacher's and student's visual attention",
        title_justify="left",
    )
    table.add_column("layer")
    for when in alike:
        table.add_column(when, justify="right")
    for layer in next(iter(alike.values())):
        values = [f"{layers[layer]:.3f}" for layers in alike.values()]
        table.add_row(layer, *values, style="bold" if layer == "mean" else "")
    return table


def attention_picture(models: dict[str, LlavaForConditionalGeneration], test: EvaluationSet) -> Any:
    """Where each model looks, from the token that predicts the answer, all layers averaged."""
    examples = []
    for number, type in enumerate(SHOWN):
        item: Item = test.of_type(type)[number]  # not picked by hand; another scene for each type
        image = render(test.scenes[item.scene])
        inputs = build_processor()(
            images=image, text=IMAGE + item.question.text, return_tensors="pt"
        )
        looks = []
        for name, model in models.items():
            maps = torch.stack(list(visual_attention(model, inputs, rows="last").values()))
            weights = maps.mean(dim=0)[0, -1]
            side = round(len(weights) ** 0.5)
            looks.append(Look(name, weights.view(side, side).numpy()))
        examples.append(Example(image, item.question.text, looks))
    return attention_figure(
        examples, caption="attention to the image while answering (mean of heads and layers)"
    )


def curves(history: History) -> Any:
    named = {"next-token loss": history.lm, "logit distillation": history.kd}
    if any(history.alignment):
        named["alignment (1 - cosine)"] = history.alignment
    return curves_figure(named, x=range(1, len(history.lm) + 1))


def write_json(results: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(part, path)
    return path


def main() -> None:
    default = StudentSettings()
    parser = argparse.ArgumentParser(
        description="Distil a small vision-language model with attention alignment, on a CPU."
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default out/demo")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a save_pretrained folder")
    parser.add_argument("--per-type", type=int, default=200, help="test questions per type")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    for name, value in vars(default).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = StudentSettings(**{name: getattr(arguments, name) for name in vars(default)})
    run(settings, arguments.out, per_type=arguments.per_type, teacher_folder=arguments.teacher)


if __name__ == "__main__":
    main()
