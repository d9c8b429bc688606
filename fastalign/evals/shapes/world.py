"""Scenes: a few coloured shapes on a 3 x 3 grid of cells, drawn from a seed.

A scene is plain data. Its *layout* (which colour and shape sits in which cell) is all that a
question can ask about; size, jitter, background and noise are nuisances of the rendering.

Splits are disjoint **by construction**: the hash of a layout decides which split may hold it, so
no layout of the test split is ever seen in training, however many scenes are drawn.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, get_args

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
GRID = 3
CELL = 16
IMAGE_SIZE = GRID * CELL
"""Pixels per side of a rendered scene."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Thing:
    """One object. ``row`` and ``column`` are cells; ``dx``, ``dy`` and ``radius`` are pixels."""

    colour: str
    shape: str
    row: int
    column: int
    dx: int = 0
    dy: int = 0
    radius: int = 6

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.column

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the object, in pixels from the top left corner."""
        return (self.column + 0.5) * CELL + self.dx, (self.row + 0.5) * CELL + self.dy


@dataclass(frozen=True)
class Scene:
    """Things with pairwise distinct names and cells, on a noisy background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int] = (40, 40, 40)
    noise_seed: int = 0

    def at(self, row: int, column: int) -> Thing | None:
        """The thing in a cell; None if the cell is empty or outside the grid."""
        return next((t for t in self.things if t.cell == (row, column)), None)

    def named(self, colour: str, shape: str) -> Thing | None:
        return next((t for t in self.things if (t.colour, t.shape) == (colour, shape)), None)

    @property
    def layout(self) -> str:
        """Canonical text of what is where: equal for scenes that differ in nuisances only."""
        return ";".join(sorted(f"{t.row}{t.column} {t.name}" for t in self.things))


def split_of(scene: Scene) -> Split:
    """The only split that may hold this scene: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256(scene.layout.encode()).digest()[0]
    if bucket < 26:
        return "test"
    return "validation" if bucket < 52 else "train"


def make_scene(
    split: Split, index: int, *, seed: int = 0, things: tuple[int, int] = (4, 6)
) -> Scene:
    """Scene number ``index`` of a split: the same for the same arguments, on every machine.

    ``things`` bounds the number of objects, both ends included.
    """
    rng = random.Random(f"shapes/{seed}/{split}/{index}/{things[0]}-{things[1]}")
    while True:
        scene = _draw(rng, rng.randint(*things))
        if split_of(scene) == split:
            return scene


def make_scenes(
    split: Split, count: int, *, seed: int = 0, things: tuple[int, int] = (4, 6)
) -> list[Scene]:
    return [make_scene(split, index, seed=seed, things=things) for index in range(count)]


def overlap(first: list[Scene], second: list[Scene]) -> set[str]:
    """Layouts that both lists hold; empty for scenes of different splits."""
    return {scene.layout for scene in first} & {scene.layout for scene in second}


def _draw(rng: random.Random, count: int) -> Scene:
    # A palette that varies from scene to scene makes counts of 0, 1, 2 and 3 all common.
    while True:
        colours = rng.sample(COLOURS, rng.randint(2, len(COLOURS)))
        shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
        if len(colours) * len(shapes) >= count:
            break
    names = rng.sample([(c, s) for c in colours for s in shapes], count)
    cells = rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], count)
    things = []
    for (colour, shape), (row, column) in zip(names, cells, strict=True):
        radius = rng.randint(5, 7)
        reach = CELL // 2 - radius  # the object stays inside its cell
        dx, dy = rng.randint(-reach, reach), rng.randint(-reach, reach)
        things.append(Thing(colour, shape, row, column, dx, dy, radius))
    tone = rng.choice((30, 60, 120, 200, 230))
    background = tuple(tone + rng.randint(-15, 15) for _ in range(3))
    return Scene(tuple(things), background, rng.getrandbits(31))  # type: ignore[arg-type]
