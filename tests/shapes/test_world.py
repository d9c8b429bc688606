"""Scenes: deterministic, well-formed, in disjoint splits; rendering: pure and legible."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fastalign.evals.shapes.render import NOISE, RGB, render, render_batch
from fastalign.evals.shapes.world import (
    CELL,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    make_scene,
    make_scenes,
    overlap,
    split_of,
)


def test_the_same_arguments_give_the_same_scene() -> None:
    assert make_scene("train", 7, seed=3) == make_scene("train", 7, seed=3)
    assert make_scene("train", 7, seed=3) != make_scene("train", 8, seed=3)
    assert make_scene("train", 7, seed=3) != make_scene("train", 7, seed=4)


def test_a_scene_is_the_same_in_another_process() -> None:
    code = (
        "from fastalign.evals.shapes.world import make_scene; print(make_scene('test', 5).layout)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == make_scene("test", 5).layout


@pytest.mark.parametrize("things", [(2, 3), (4, 6)])
def test_scenes_are_well_formed(things: tuple[int, int]) -> None:
    for scene in make_scenes("train", 300, things=things):
        assert things[0] <= len(scene.things) <= things[1]
        assert len({t.name for t in scene.things}) == len(scene.things)
        assert len({t.cell for t in scene.things}) == len(scene.things)
        for t in scene.things:
            x, y = t.centre
            assert t.column * CELL <= x - t.radius
            assert x + t.radius <= (t.column + 1) * CELL
            assert t.row * CELL <= y - t.radius
            assert y + t.radius <= (t.row + 1) * CELL


def test_splits_share_no_layout() -> None:
    scenes = {split: make_scenes(split, 2_000) for split in SPLITS}
    for split, members in scenes.items():
        assert {split_of(scene) for scene in members} == {split}
    assert not overlap(scenes["train"], scenes["test"])
    assert not overlap(scenes["train"], scenes["validation"])
    assert not overlap(scenes["validation"], scenes["test"])


def test_overlap_ignores_nuisances_and_finds_a_planted_layout() -> None:
    scene = make_scene("train", 0)
    moved = Scene(
        tuple(Thing(t.colour, t.shape, t.row, t.column) for t in reversed(scene.things)),
        background=(0, 0, 0),
    )
    assert overlap([scene], [moved]) == {scene.layout}


def test_rendering_is_a_pure_function() -> None:
    scene = make_scene("train", 1)
    first = np.asarray(render(scene))
    for other in make_scenes("train", 5):
        render(other)
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(first, np.asarray(render(scene)))
    assert np.array_equal(render_batch([scene])[0], first)


def test_every_thing_is_drawn_in_its_own_cell() -> None:
    for scene in make_scenes("train", 100):
        image = np.asarray(render(scene)).astype(int)
        for t in scene.things:
            x, y = t.centre
            middle = image[int(y), int(x)]
            assert np.abs(middle - RGB[t.colour]).max() <= NOISE
        for row in range(GRID):
            for column in range(GRID):
                if scene.at(row, column) is None:
                    # without its border, which the smooth edge of a neighbour may touch
                    cell = image[row * CELL + 1 :, column * CELL + 1 :][: CELL - 2, : CELL - 2]
                    assert np.abs(cell - np.array(scene.background)).max() <= NOISE


def test_shapes_and_colours_can_be_told_apart() -> None:
    def silhouette(shape: str) -> np.ndarray:
        image = np.asarray(render(Scene((Thing("red", shape, 1, 1, radius=5),)))).astype(int)
        return image[..., 0] > 130

    marks = [silhouette(shape) for shape in SHAPES]
    for i, one in enumerate(marks):
        assert one.sum() > 20
        for other in marks[i + 1 :]:
            assert (one ^ other).sum() >= 10
    tones = np.array(list(RGB.values()))
    apart = np.abs(tones[:, None] - tones[None]).max(-1) + 999 * np.eye(len(tones), dtype=int)
    assert apart.min() > 4 * NOISE


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        render(Scene((Thing("red", "star", 0, 0),)))
