"""Questions about a scene, with minimal pairs and balanced answers.

=========== ======================================== ==================== ======
type        example                                  answers              chance
=========== ======================================== ==================== ======
recognise   is there a red thing? a circle?          yes / no             1/2
binding     is there a red circle?                   yes / no             1/2
relation    is the red circle left of the blue ...?  yes / no             1/2
neighbour   what is just above the red circle?       colour shape /       1/8
                                                     nothing
count       how many red things? how many circles?   zero .. three        1/4
where       where is the red circle?                 row column           1/9
at          what is at top left?                     colour shape /       1/8
                                                     nothing
=========== ======================================== ==================== ======

``binding``, ``relation``, ``neighbour`` and ``count`` need composition; ``where`` and ``at`` are
auxiliary (they teach a model to find a thing), ``recognise`` needs neither.

A *stratum* fixes what has to be balanced within a type (the answer, and for instance which of the
four relations is asked). Chance is what the best constant answer scores when strata are drawn by
their shares. Yes/no questions carry their minimal pair: the twin question about the same image
that differs in one swapped or replaced word and has the other answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fastalign.evals.shapes.world import COLOURS, COLUMNS, GRID, ROWS, SHAPES, Scene, Thing

RELATIONS = {
    "left_of": "left of",
    "right_of": "right of",
    "above": "above",
    "below": "below",
}
OPPOSITE = {"left_of": "right_of", "right_of": "left_of", "above": "below", "below": "above"}
STEP = {"left_of": (0, -1), "right_of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""(rows, columns) from the anchor to the cell that is just left of, right of, ... it."""
NUMBERS = ("zero", "one", "two", "three")
NOTHING = "nothing"


@dataclass(frozen=True)
class Question:
    """``kind`` names the minimal pair (swap_att, swap_obj, replace_rel, ...) and ``twin`` is the
    other question of that pair, whose answer is the opposite one."""

    text: str
    answer: str
    type: str
    detail: str = ""
    kind: str | None = None
    twin: str | None = None


@dataclass(frozen=True)
class Stratum:
    """What one question has to be: ``detail`` is the type's own subdivision."""

    detail: str
    answer: str
    share: float


Asker = Callable[[Scene, random.Random, Stratum], Question | None]


def ask(type: str, scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    """A question of this type and stratum, or None where the scene offers none."""
    return ASKERS[type](scene, rng, stratum)


def ask_any(type: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of this type, from the first stratum, drawn by share, that the scene offers."""
    strata = list(STRATA[type])
    while strata:
        stratum = rng.choices(strata, [s.share for s in strata])[0]
        question = ask(type, scene, rng, stratum)
        if question is not None:
            return question
        strata.remove(stratum)
    return None


def chance(type: str) -> float:
    """The score of the best constant answer on balanced strata."""
    shares: dict[str, float] = {}
    for stratum in STRATA[type]:
        shares[stratum.answer] = shares.get(stratum.answer, 0.0) + stratum.share
    if type in ("neighbour", "at"):  # "thing" stands for 24 different answers
        del shares["thing"]
    return max(shares.values()) / sum(s.share for s in STRATA[type])


# --- one function per type ------------------------------------------------------------------


def _recognise(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    words = COLOURS if stratum.detail == "colour" else SHAPES
    present = {getattr(t, stratum.detail) for t in scene.things}
    here = [w for w in words if w in present]
    absent = [w for w in words if w not in present]
    if not here or not absent:
        return None

    def text(word: str) -> str:
        return f"is there a {word} thing?" if stratum.detail == "colour" else f"is there a {word}?"

    true, false = text(rng.choice(here)), text(rng.choice(absent))
    kind = "replace_att" if stratum.detail == "colour" else "replace_obj"
    return _pair("recognise", stratum, true, false, kind)


def _binding(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    # The false twin gives one thing the shape of another: both words are in the picture.
    pairs = [
        (a, b)
        for a in scene.things
        for b in scene.things
        if a.colour != b.colour and a.shape != b.shape and not scene.named(a.colour, b.shape)
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    # Keeping the colour or keeping the shape of the true name are equally likely.
    true = a if rng.random() < 0.5 else b
    texts = f"is there a {true.name}?", f"is there a {a.colour} {b.shape}?"
    return _pair("binding", stratum, *texts, "swap_att")


def _relation(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    pairs = [(a, b) for a in scene.things for b in scene.things if holds(stratum.detail, a, b)]
    if not pairs:
        return None
    a, b = rng.choice(pairs)  # a REL b is true
    kind = rng.choice(("swap_obj", "replace_rel"))
    rel, other = stratum.detail, OPPOSITE[stratum.detail]
    if stratum.answer == "yes":
        true = relation_text(rel, a, b)
        false = relation_text(rel, b, a) if kind == "swap_obj" else relation_text(other, a, b)
    else:
        false = relation_text(rel, b, a)
        true = relation_text(rel, a, b) if kind == "swap_obj" else relation_text(other, b, a)
    return _pair("relation", stratum, true, false, kind)


def _neighbour(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    rows, columns = STEP[stratum.detail]
    found = [(t, scene.at(t.row + rows, t.column + columns)) for t in scene.things]
    found = [(t, n) for t, n in found if (n is None) == (stratum.answer == NOTHING)]
    if not found:
        return None
    anchor, neighbour = rng.choice(found)
    text = f"what is just {RELATIONS[stratum.detail]} the {anchor.name}?"
    answer = neighbour.name if neighbour else NOTHING
    return Question(text, answer, "neighbour", stratum.detail)


def _count(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    words = COLOURS if stratum.detail == "colour" else SHAPES
    number = NUMBERS.index(stratum.answer)
    fitting = [w for w in words if _tally(scene, stratum.detail, w) == number]
    if not fitting:
        return None
    word = rng.choice(fitting)
    noun = f"{word} things" if stratum.detail == "colour" else f"{word} shapes"
    return Question(f"how many {noun}?", stratum.answer, "count", stratum.detail)


def _where(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    thing = next((t for t in scene.things if place(*t.cell) == stratum.answer), None)
    if thing is None:
        return None
    return Question(f"where is the {thing.name}?", stratum.answer, "where")


def _at(scene: Scene, rng: random.Random, stratum: Stratum) -> Question | None:
    cells = [(r, c) for r in range(GRID) for c in range(GRID)]
    cells = [cell for cell in cells if (scene.at(*cell) is None) == (stratum.answer == NOTHING)]
    if not cells:
        return None
    cell = rng.choice(cells)
    thing = scene.at(*cell)
    return Question(f"what is at {place(*cell)}?", thing.name if thing else NOTHING, "at")


def _pair(type: str, stratum: Stratum, true: str, false: str, kind: str) -> Question:
    text, twin = (true, false) if stratum.answer == "yes" else (false, true)
    return Question(text, stratum.answer, type, stratum.detail, kind, twin)


def _tally(scene: Scene, attribute: str, word: str) -> int:
    return sum(getattr(t, attribute) == word for t in scene.things)


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """a REL b: by at least one whole cell along the axis asked, whatever the other axis."""
    rows, columns = STEP[relation]
    return (a.row - b.row) * rows + (a.column - b.column) * columns > 0


def relation_text(relation: str, a: Thing, b: Thing) -> str:
    return f"is the {a.name} {RELATIONS[relation]} the {b.name}?"


def place(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS[column]}"


ASKERS: dict[str, Asker] = {
    "recognise": _recognise,
    "binding": _binding,
    "relation": _relation,
    "neighbour": _neighbour,
    "count": _count,
    "where": _where,
    "at": _at,
}
TYPES = tuple(ASKERS)
COMPOSITION = ("binding", "relation", "neighbour", "count")
"""The types whose mean accuracy is the composition score."""

_YES_NO = ("yes", "no")
_THINGS = (("thing", 7.0), (NOTHING, 1.0))
STRATA: dict[str, tuple[Stratum, ...]] = {
    "recognise": tuple(Stratum(d, a, 1) for d in ("colour", "shape") for a in _YES_NO),
    "binding": tuple(Stratum("", a, 1) for a in _YES_NO),
    "relation": tuple(Stratum(d, a, 1) for d in RELATIONS for a in _YES_NO),
    "neighbour": tuple(Stratum(d, a, w) for d in RELATIONS for a, w in _THINGS),
    "count": tuple(Stratum(d, a, 1) for d in ("colour", "shape") for a in NUMBERS),
    "where": tuple(Stratum("", place(r, c), 1) for r in range(GRID) for c in range(GRID)),
    "at": tuple(Stratum("", a, w) for a, w in _THINGS),
}
