"""Pictures: attention laid over an image, and curves of a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image as PILImage


@dataclass(frozen=True)
class Look:
    """How one model looked at an image while it answered.

    Attributes:
        weights: [rows, columns] >= 0.
        cosine: its similarity with the teacher's look, printed with the title; None: not known.
    """

    title: str
    weights: NDArray[np.floating]
    cosine: float | None = None


@dataclass(frozen=True)
class Example:
    """A row of the picture: the image, the question about it and the models' looks."""

    image: PILImage
    question: str
    looks: Sequence[Look]


def overlay(image: PILImage, weights: NDArray[np.floating], *, side: int = 240) -> PILImage:
    """The image, greyed and dimmed, with the weights in colour over it: RGB of side x side pixels.

    The largest weight is fully opaque; an all-zero map leaves the grey image.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2:
        raise ValueError(f"weights have shape {weights.shape}; expected [rows, columns]")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite and not negative")
    share = weights / weights.max() if weights.max() > 0 else weights
    # Nearest: a visual token is a square of the image, and should look like one.
    large = np.asarray(
        Image.fromarray(share.astype(np.float32)).resize((side, side), Image.Resampling.NEAREST)
    )[..., None]
    picture = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
    colours = np.asarray(picture, np.float64)
    # Dimmed, or the heat would not show on a white image.
    grey = 0.55 * (0.5 * colours + 0.5 * colours.mean(axis=-1, keepdims=True))
    heat = np.stack([_heat(large[..., 0], channel) for channel in range(3)], axis=-1)
    mixed = grey * (1 - 0.75 * large) + heat * 0.75 * large
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def _heat(share: NDArray[np.floating], channel: int) -> NDArray[np.floating]:
    """Dark red through orange to yellow, readable in grey as well."""
    stops = ((120.0, 0.0, 30.0), (250.0, 110.0, 20.0), (255.0, 240.0, 80.0))
    heat: NDArray[np.floating] = np.interp(
        share, (0.0, 0.5, 1.0), [stop[channel] for stop in stops]
    )
    return heat


def attention_figure(examples: Sequence[Example], *, caption: str = "") -> Figure:
    """One row per example: the image, then every model's attention over it.

    Every map is coloured up to its own largest weight, so its title says how large that is: the share of
    the attention to the image that goes to this one token.
    """
    from matplotlib.figure import Figure

    columns = 1 + max(len(example.looks) for example in examples)
    figure = Figure(figsize=(2.3 * columns, 2.6 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for axes, example in zip(grid, examples, strict=True):
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(example.image, interpolation="nearest")
        axes[0].set_title(_wrapped(example.question), fontsize=9)
        for axis, look in zip(axes[1:], example.looks, strict=False):
            axis.imshow(overlay(example.image, look.weights))
            cosine = "" if look.cosine is None else f"cosine {look.cosine:.3f}, "
            axis.set_title(f"{look.title}\n{cosine}peak {_peak(look.weights):.0%}", fontsize=9)
    if caption:
        figure.suptitle(caption, fontsize=9)
    return figure


def _peak(weights: NDArray[np.floating]) -> float:
    total = float(weights.sum())
    return float(weights.max()) / total if total > 0 else 0.0


def curves_figure(curves: Mapping[str, Sequence[float]], *, x: Sequence[float]) -> Figure:
    """One panel per named curve over the same ``x`` (training steps)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.6), layout="constrained")
    for axis, (name, values) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        axis.plot(x, values, linewidth=1.2, color="#b5341f")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a png; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        figure.savefig(part, dpi=130)
        os.replace(part, path)
    return path


def _wrapped(text: str, width: int = 26) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
