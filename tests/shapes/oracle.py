"""Answers from the scene's plain data and the question's words, sharing no code with the askers."""

from __future__ import annotations

import re

from fastalign.evals.shapes.world import Scene

NUMBER = {0: "zero", 1: "one", 2: "two", 3: "three"}
ROW = {"top": 0, "middle": 1, "bottom": 2}
COLUMN = {"left": 0, "centre": 1, "right": 2}


def answer(scene: Scene, text: str) -> str:
    """The answer of a question; AssertionError where the question has none."""
    cells = {(t.row, t.column): f"{t.colour} {t.shape}" for t in scene.things}
    places = {name: cell for cell, name in cells.items()}
    assert len(cells) == len(places) == len(scene.things), "referents must be unique"

    if m := re.fullmatch(r"is there a (\w+) thing\?", text):
        return yes_no(any(name.split()[0] == m[1] for name in places))
    if m := re.fullmatch(r"is there a (\w+)\?", text):
        return yes_no(any(name.split()[1] == m[1] for name in places))
    if m := re.fullmatch(r"is there a (\w+ \w+)\?", text):
        return yes_no(m[1] in places)
    if m := re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", text):
        (row_a, column_a), (row_b, column_b) = places[m[1]], places[m[3]]
        axis = {
            "left of": column_b - column_a,
            "right of": column_a - column_b,
            "above": row_b - row_a,
            "below": row_a - row_b,
        }[m[2]]
        assert axis != 0, "the two must differ along the axis asked"
        return yes_no(axis > 0)
    if m := re.fullmatch(r"what is just (left of|right of|above|below) the (\w+ \w+)\?", text):
        row, column = places[m[2]]
        cell = {
            "left of": (row, column - 1),
            "right of": (row, column + 1),
            "above": (row - 1, column),
            "below": (row + 1, column),
        }[m[1]]
        return cells.get(cell, "nothing")
    if m := re.fullmatch(r"how many (\w+) things\?", text):
        return NUMBER[sum(name.split()[0] == m[1] for name in places)]
    if m := re.fullmatch(r"how many (\w+) shapes\?", text):
        return NUMBER[sum(name.split()[1] == m[1] for name in places)]
    if m := re.fullmatch(r"where is the (\w+ \w+)\?", text):
        row, column = places[m[1]]
        return f"{list(ROW)[row]} {list(COLUMN)[column]}"
    if m := re.fullmatch(r"what is at (\w+) (\w+)\?", text):
        return cells.get((ROW[m[1]], COLUMN[m[2]]), "nothing")
    raise AssertionError(f"no rule for {text!r}")


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"
