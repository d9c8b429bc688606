"""The pictures of a report: heat maps over layers, curves over layers, accuracy by similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Told apart without colour vision (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEACHER = "#555555"


def heat_figure(grids: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Figure:
    """Cosine of every student layer (rows) with every teacher layer (columns), a panel a student.

    Colours run from the tenth below the least value to 1: cosines of attention are seldom near 0, and a
    scale that begins there shows little else.
    """
    from matplotlib.figure import Figure

    known = [v for grid in grids.values() for row in grid.values() for v in row.values()]
    low = math.floor(10 * min((v for v in known if v is not None), default=0.0)) / 10
    low = min(low, 0.9)
    figure = Figure(figsize=(1.2 + 3.2 * len(grids), 3.4), layout="constrained")
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    image: Any = None
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        rows = sorted(grid, key=int)
        columns = sorted(grid[rows[0]], key=int)
        values = np.array([[_number(grid[i][j]) for j in columns] for i in rows])
        image = axis.imshow(values, vmin=low, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("teacher layer")
        axis.set_ylabel("student layer")
        _layer_ticks(axis.set_xticks, columns)
        _layer_ticks(axis.set_yticks, rows)
        if values.size <= 100:
            for (i, j), value in np.ndenumerate(values):
                shade = "white" if value < low + 0.6 * (1 - low) else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=axes, label="cosine, answer rows, visual columns", shrink=0.9)
    return figure


def pairs_figure(pairs: Mapping[str, Any]) -> Figure:
    """Each metric over student layers; line: visual columns, dashes: text columns (control)."""
    from matplotlib.figure import Figure

    metrics = {"cosine": "cosine", "kl": "KL (nats)", "js": "JS (nats)"}
    rows = ("visual", "question", "answer")
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.subplots(len(metrics), len(rows), sharex=True, sharey="row")
    for number, (name, layers) in enumerate(pairs.items()):
        x = [int(i) for i in layers]
        for axes, metric in zip(grid, metrics, strict=True):
            for axis, row in zip(axes, rows, strict=True):
                for columns, style in (("visual", "o-"), ("text", "x--")):
                    y = [_number(layers[i][row][columns][metric]) for i in layers]
                    label = f"{name}, {columns} columns"
                    axis.plot(
                        x, y, style, color=COLOURS[number % len(COLOURS)], label=label, markersize=4
                    )
    for axes, label in zip(grid, metrics.values(), strict=True):
        axes[0].set_ylabel(label)
    for axis, row in zip(grid[0], rows, strict=True):
        axis.set_title(f"{row} rows", fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("student layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, grid)
    return figure


def looks_figure(looks: Mapping[str, Any], row: str = "answer") -> Figure:
    """How much each model looks at the image, how widely, and how much of it goes to sinks."""
    from matplotlib.figure import Figure

    titles = {
        "mass": "attention to the image",
        "entropy": "entropy over the image (nats)",
        "sink_share": "share of it that goes to sinks",
    }
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    grid = figure.subplots(1, len(titles))
    others = iter(COLOURS)
    for name, layers in looks.items():
        colour = TEACHER if name == "teacher" else next(others)
        x = [int(i) for i in layers]
        for axis, what in zip(grid, titles, strict=True):
            y = [_number(layers[i][row][what]) for i in layers]
            axis.plot(x, y, "o-", color=colour, label=name, markersize=4)
    for what, axis in zip(titles, grid, strict=True):
        if what != "entropy":  # shares are read from 0; entropies differ far above it
            axis.margins(y=0.1)
            axis.set_ylim(bottom=0)
    for axis, title in zip(grid, titles.values(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"layer ({row} rows)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, grid)
    return figure


def bins_figure(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Accuracy by similarity: equally many samples a bin.

    Bars: from the bin's least to its most alike; up and down one binomial standard error.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, found) in enumerate(bins.items()):
        middle = np.array([(b["low"] + b["high"]) / 2 for b in found])
        accuracy = [b["accuracy"] for b in found]
        half = np.array([(b["high"] - b["low"]) / 2 for b in found])
        axis.errorbar(
            middle,
            accuracy,
            xerr=half,
            yerr=[
                (a * (1 - a) / b["samples"]) ** 0.5 for a, b in zip(accuracy, found, strict=True)
            ],
            fmt="o-",
            color=COLOURS[number % len(COLOURS)],
            label=name,
            markersize=4,
            linewidth=1,
        )
    axis.set_xlabel("cosine with the teacher (answer rows, visual columns, matched layers)")
    axis.set_ylabel("accuracy")
    axis.set_ylim(-0.02, 1.02)
    _finish(figure, [axis])
    return figure


def mixing_figure(mixing: Mapping[str, Mapping[str, float]]) -> Figure:
    """Accuracy over the teacher's share of the student's attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, found) in enumerate(mixing.items()):
        weights = sorted(found, key=float)
        axis.plot(
            [float(w) for w in weights],
            [found[w] for w in weights],
            "o-",
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    axis.set_xlabel("the teacher's share of the student's visual attention, at inference")
    axis.set_ylabel("accuracy")
    axis.set_ylim(-0.02, 1.02)
    _finish(figure, [axis])
    return figure


def _finish(figure: Figure, axes: Any) -> None:
    flat = np.ravel(np.asarray(axes, dtype=object))
    for axis in flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _layer_ticks(set_ticks: Any, layers: Sequence[str]) -> None:
    step = max(1, len(layers) // 12)
    places = list(range(0, len(layers), step))
    set_ticks(places, [layers[i] for i in places])


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
