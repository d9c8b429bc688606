"""The study's first measure along the way: over steps and over CPU seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..analysis.pictures import save_figure
from .records import Record
from .study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves_figure", "save_figure"]

#: Told apart without colour vision (Okabe and Ito), and by line style after the first round.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


def curves_figure(study: Study, runs: dict[str, dict[int, Record]]) -> Figure:
    """Mean over seeds (line) and every run (faint)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    measure = study.measures[0]
    for number, (name, seeds) in enumerate(runs.items()):
        if not seeds:
            continue
        colour = COLOURS[number % len(COLOURS)]
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        curves = [r.curve for r in seeds.values()]
        for axis, key in ((left, "step"), (right, "cpu_seconds")):
            x = np.array([[entry[key] for entry in curve] for curve in curves])
            y = np.array([[entry["scores"][measure] for entry in curve] for curve in curves])
            for one_x, one_y in zip(x, y, strict=True):
                axis.plot(one_x, one_y, style, color=colour, linewidth=0.6, alpha=0.3)
            label = f"{name} ({len(seeds)})" if axis is left else None
            axis.plot(x.mean(0), y.mean(0), style, color=colour, linewidth=1.8, label=label)
    left.set_xlabel("step")
    right.set_xlabel("CPU seconds of training")
    left.set_ylabel(f"{measure}, scenes scored along the way")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
