"""A measurement as files: ``report.json``, ``report.html`` and its pictures as png."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import bins_figure, heat_figure, looks_figure, mixing_figure, pairs_figure
from .page import Page
from .pictures import Example, attention_figure, save_figure


def write_report(
    folder: Path, found: Mapping[str, Any], examples: Sequence[Example] = (), title: str = ""
) -> list[Path]:
    """Write all files; returns their paths.

    Args:
        found: ``Measurement.summary()``, with ``mixing`` ({student: {weight: accuracy}}) where it was
            measured.
        examples: overlays, teacher and students side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(title or "Where teacher and student look")
    written: list[Path] = []

    def picture(name: str, make: Callable[[], Any], description: str) -> None:
        figure = make()
        page.picture(figure, description)
        written.append(save_figure(figure, folder / f"{name}.png"))

    page.note(
        f"{found['samples']} samples. Attention is the joint softmax over all visible tokens, mean over "
        "heads, unless said otherwise. Answer rows are those that predict a labelled token."
    )
    page.table(
        ("model", "accuracy", "cosine with the teacher"),
        [
            (name, _shown(value), _shown(_cosine(found, name)))
            for name, value in found["accuracy"].items()
        ],
    )
    if examples:
        page.heading("Examples")
        page.note(
            "Attention to the image while answering: mean of heads, answer rows and matched layers. Each "
            "map is coloured up to its own largest weight; peak is what share of the attention to the "
            f"image that one token has{_even(examples)}. The cosine is the mean over these layers and rows."
        )
        picture(
            "examples",
            lambda: attention_figure(examples),
            "Images and, over them, the attention of the teacher and of each student.",
        )
    if "grid" in found:
        page.heading("Every layer with every layer")
        picture(
            "layers",
            lambda: heat_figure(found["grid"]),
            "Heat map of the cosine of student layers with teacher layers.",
        )
    page.heading("Matched layers")
    page.note(
        "Cosine of joint maps; KL(teacher, student) and Jensen-Shannon in nats of the distributions over "
        "the columns. Text columns are a control: similarity there is no similarity of looking, "
        "and visual rows often see one text token only, which is alike by itself."
    )
    picture(
        "pairs",
        lambda: pairs_figure(found["pairs"]),
        "Cosine, KL and JS over layers for visual, question and answer rows.",
    )
    page.heading("How each model looks")
    page.note(
        f"Sinks: visual tokens that receive {found['sink_sigma']:g} standard deviations more than the "
        "mean of their image's tokens."
    )
    picture(
        "looks",
        lambda: looks_figure(found["looks"]),
        "Attention to the image, its entropy and its share on sinks, over layers.",
    )
    page.heading("Accuracy by similarity")
    page.note(
        "Samples in bins of equal size, least alike first; bars span a bin's similarities and one "
        "standard error of its accuracy. A slope is no proof that similarity makes the "
        "accuracy: easy samples may be both."
    )
    picture(
        "bins",
        lambda: bins_figure(found["bins"]),
        "Accuracy of each student over its cosine with the teacher.",
    )
    if found.get("mixing"):
        page.heading("The teacher's attention in the student")
        page.note(
            "At inference, in the matched layers, the student's attention to the image is mixed with the "
            "teacher's, mean over its heads; 1 replaces it. Nothing else is changed. Heads that differ "
            "become one map, which costs accuracy by itself: a copy of the teacher loses some, too."
        )
        picture(
            "mixing",
            lambda: mixing_figure(found["mixing"]),
            "Accuracy over the teacher's share of the student's visual attention.",
        )
    for name, text in (
        ("report.json", json.dumps(found, indent=1) + "\n"),
        ("report.html", page.text()),
    ):
        part = folder / (name + ".part")
        part.write_text(text)
        os.replace(part, folder / name)
        written.append(folder / name)
    return written


def _even(examples: Sequence[Example]) -> str:
    sizes = {look.weights.size for example in examples for look in example.looks}
    return f" ({1 / sizes.pop():.1%} if all had the same)" if len(sizes) == 1 else ""


def _cosine(found: Mapping[str, Any], name: str) -> float | None:
    layers = found.get("pairs", {}).get(name)
    if not layers:
        return None
    values = [layer["answer"]["visual"]["cosine"] for layer in layers.values()]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
