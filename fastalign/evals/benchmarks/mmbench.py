"""MMBench (Liu et al., arXiv 2307.06281): lettered questions, right only in every rotation of the options.

Circular evaluation: a question with k options is asked k times, the options moved round by one each
time, and counts if all k answers are right. The tsv holds the rotations as rows of their own (index
+ 1,000,000 n); for a file without them they are made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SampleError
from ..benchmark import Benchmark, Verdict, by_group, mean, unique
from ..choices import LETTERS
from ..files import Encoded, Row, data_files, read_rows, shown
from ..images import Picture, base64_picture, picture
from ..protocols import Ask, Reply, Wording, chosen, lettered, multiple_choice

ROUND = 1_000_000
MOST_OPTIONS = 8


@dataclass(frozen=True)
class Rotation:
    """One order of the options; ``answer`` is the right one's place."""

    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Question:
    """A question in all its rotations."""

    id: str
    where: str
    image: Picture
    question: str
    rotations: tuple[Rotation, ...]
    category: str
    ability: str


def read(data: Path, images: Path | None) -> list[Question]:
    groups: dict[int, list[tuple[int, Row]]] = {}
    pictures: dict[int, Picture] = {}
    for path in data_files(data, "*.tsv", "*.parquet"):
        for row in read_rows(path):
            index = row.number("index")
            groups.setdefault(index % ROUND, []).append((index // ROUND, row))
            found = _picture(row, images)
            if found is not None:
                pictures[index] = found
    published = any(len(rows) > 1 for rows in groups.values())
    return unique([_question(i, rows, pictures, published) for i, rows in groups.items()])


def _picture(row: Row, images: Path | None) -> Picture | None:
    """None: the field names another row, whose image it shares."""
    value = row.value("image")
    if isinstance(value, Encoded):
        return picture(row, "image", root=images)
    if isinstance(value, str) and value.isdecimal():
        return None
    if isinstance(value, str) and images is not None and len(value) < 256:
        return picture(row, "image", root=images)
    return base64_picture(row, "image")


def _question(
    index: int, rows: list[tuple[int, Row]], pictures: Mapping[int, Picture], published: bool
) -> Question:
    rows = sorted(rows, key=lambda pair: pair[0])
    rounds, row = [number for number, _ in rows], rows[0][1]
    if rounds != list(range(len(rows))):
        raise SampleError(
            row.where, f"question {index} has the rounds {rounds}; allowed: 0, 1, ..."
        )
    rotations = [_rotation(r) for _, r in rows]
    if not published:
        rotations = _rotate(rotations[0])
    elif len({rotation.options[rotation.answer] for rotation in rotations}) > 1:
        raise SampleError(row.where, f"question {index} has another answer in another rotation")
    if index in pictures:
        image = pictures[index]
    else:
        other = row.number("image")
        if other not in pictures:
            raise SampleError(row.where, f"shares the image of row {other}, which has none")
        image = pictures[other]
    hint, question = row.optional("hint"), row.text("question")
    return Question(
        id=str(index),
        where=row.where,
        image=image,
        question=f"{hint}\n{question}" if hint else question,
        rotations=tuple(rotations),
        category=row.optional("category"),
        ability=row.optional("l2-category", "L2-category"),
    )


def _rotation(row: Row) -> Rotation:
    options = []
    for letter in LETTERS[:MOST_OPTIONS]:
        text = row.optional(letter)
        if not text:
            break
        options.append(text)
    if len(options) < 2:
        raise SampleError(row.where, f"has {len(options)} options; allowed: at least A and B")
    answer = row.optional("answer").strip().upper()
    if not answer:
        raise SampleError(row.where, "has no answer; the test split has none, use dev")
    if answer not in LETTERS[: len(options)] or len(answer) != 1:
        allowed = ", ".join(LETTERS[: len(options)])
        raise SampleError(row.where, f"'answer' is {shown(answer)}; allowed: {allowed}")
    return Rotation(tuple(options), LETTERS.index(answer))


def _rotate(first: Rotation) -> list[Rotation]:
    count = len(first.options)
    return [
        Rotation(first.options[n:] + first.options[:n], (first.answer - n) % count)
        for n in range(count)
    ]


def ask(sample: Question, wording: Wording) -> list[Ask]:
    asks = []
    for number, rotation in enumerate(sample.rotations):
        question = f"{sample.question}\n{lettered(rotation.options)}"
        count = len(rotation.options)
        asks.append(multiple_choice(f"round{number}", (sample.image, question), count, wording))
    return asks


def judge(sample: Question, replies: Mapping[str, Reply]) -> Verdict:
    said = [
        chosen(replies[f"round{number}"], rotation.options)
        for number, rotation in enumerate(sample.rotations)
    ]
    right = [a == r.answer for a, r in zip(said, sample.rotations, strict=True)]
    return {
        "said": [None if a is None else LETTERS[a] for a in said],
        "right": right,
        "circular": all(right),
        "unread": said.count(None),
    }


def score(samples: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    circular = [v["circular"] for v in verdicts]
    return {
        "accuracy": mean(circular),
        "vanilla": mean(v["right"][0] for v in verdicts),
        "categories": by_group([s.category for s in samples], circular),
        "abilities": by_group([s.ability for s in samples], circular),
    }


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench dev",
    source="arXiv 2307.06281",
    files="mmbench_dev_*.tsv (images inside), or the parquet files",
    methods=("generate", "options"),
    lmms_eval="mmbench_en_dev",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
