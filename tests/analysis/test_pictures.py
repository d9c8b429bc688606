"""Pictures: the overlay's pixels, and figures that are written whole."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalign.analysis.figures import bins_figure, heat_figure, looks_figure, pairs_figure
from fastalign.analysis.pictures import (
    Example,
    Look,
    attention_figure,
    curves_figure,
    overlay,
    save_figure,
)

BLUE = Image.new("RGB", (48, 48), (20, 30, 220))


def test_the_overlay_is_warm_where_the_weight_is() -> None:
    weights = np.zeros((6, 6))
    weights[1, 4] = 0.3
    picture = np.asarray(overlay(BLUE, weights, side=60)).astype(int)
    assert picture.shape == (60, 60, 3)
    warm = picture[..., 0] > picture[..., 2]
    expected = np.zeros((60, 60), bool)
    expected[10:20, 40:50] = True
    assert np.array_equal(warm, expected)


def test_the_overlay_does_not_depend_on_the_scale_of_the_weights() -> None:
    weights = np.random.default_rng(0).random((6, 6))
    assert np.array_equal(
        np.asarray(overlay(BLUE, weights)), np.asarray(overlay(BLUE, weights / 8))
    )
    overlay(BLUE, np.zeros((6, 6)))


@pytest.mark.parametrize("weights", [np.ones(6), -np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_impossible_weights_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="weights"):
        overlay(BLUE, weights)


def test_figures_are_written(tmp_path: Path) -> None:
    looks = [Look("teacher", np.eye(6)), Look("student", np.ones((6, 6)))]
    figure = attention_figure([Example(BLUE, "where is the red circle?", looks)] * 2, caption="x")
    curves = curves_figure({"loss": [3.0, 2.0], "similarity": [0.1, 0.9]}, x=[0, 10])
    for name, made in (("looks.png", figure), ("curves.png", curves)):
        path = save_figure(made, tmp_path / "out" / name)
        with Image.open(path) as image:
            assert min(image.size) > 200
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["curves.png", "looks.png"]


def test_figures_of_data_without_any_image() -> None:
    """Similarities and shares of sinks are None then, and there are no bins."""
    nothing = {"cosine": None, "kl": None, "js": None}
    columns = {"visual": nothing, "text": {"cosine": 0.5, "kl": 0.1, "js": 0.1}}
    rows = dict.fromkeys(("visual", "question", "answer"), columns)
    looks = {"mass": 0.0, "entropy": None, "sink_share": None}
    layers = {"teacher": {"0": {"answer": looks}}, "student": {"0": {"answer": looks}}}
    figures = {
        "heat": heat_figure({"student": {"0": {"0": None}}}),
        "pairs": pairs_figure({"student": {"0": rows}}),
        "looks": looks_figure(layers),
        "bins": bins_figure({"student": []}),
    }
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        with Image.open(file) as image:
            assert min(image.size) > 200, name


def test_colours_of_cosines_begin_below_the_least() -> None:
    grid = {"student": {"0": {"0": 0.98, "1": 0.57}, "1": {"0": None, "1": 0.75}}}
    image = heat_figure(grid).axes[0].get_images()[0]
    assert image.get_clim() == (0.5, 1.0)
    assert heat_figure({"student": {"0": {"0": 1.0}}}).axes[0].get_images()[0].get_clim() == (
        0.9,
        1.0,
    )
