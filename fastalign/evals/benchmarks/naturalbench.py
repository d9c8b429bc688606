"""NaturalBench (Li et al., arXiv 2410.14669): groups of two images and two questions.

Acc: answers. Q-Acc: questions right on both images. I-Acc: images on which both questions are right.
G-Acc: groups with all four right. For lettered questions the published parser takes the first word
"a" or "b", so that "It is a dog" says A; here a letter must be delimited (``choices``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SampleError
from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import Row, data_files, read_rows, shown
from ..images import Picture, picture
from ..protocols import Ask, Reply, Wording, chosen, multiple_choice, said_yes, yes_no

_INSTRUCTIONS = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
#: (question, image) in the order of the published example.
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))


@dataclass(frozen=True)
class Group:
    """``truth[q][i]``: 0 for Yes or A, 1 for No or B."""

    id: str
    where: str
    images: tuple[Picture, Picture]
    questions: tuple[str, str]
    truth: tuple[tuple[int, int], tuple[int, int]]
    kind: str


def read(data: Path, images: Path | None) -> list[Group]:
    samples: list[Group] = []
    for path in data_files(data, "*.parquet", "*.jsonl"):
        samples += [_sample(row, images) for row in read_rows(path)]
    return unique(samples)


def _sample(row: Row, images: Path | None) -> Group:
    kind = row.choice(tuple(_INSTRUCTIONS), "Question_Type", "Question Type")
    truth = [[_answer(row, kind, f"Image_{i}_Question_{q}") for i in (0, 1)] for q in (0, 1)]
    return Group(
        id=str(row.number("Index")),
        where=row.where,
        images=(picture(row, "Image_0", root=images), picture(row, "Image_1", root=images)),
        questions=(row.text("Question_0"), row.text("Question_1")),
        truth=((truth[0][0], truth[0][1]), (truth[1][0], truth[1][1])),
        kind=kind,
    )


def _answer(row: Row, kind: str, name: str) -> int:
    allowed = ("yes", "no") if kind == "yes_no" else ("a", "b")
    value = row.text(name)
    if value.strip().lower() not in allowed:
        raise SampleError(row.where, f"{name!r} is {shown(value)}; allowed: {' or '.join(allowed)}")
    return allowed.index(value.strip().lower())


def ask(sample: Group, wording: Wording) -> list[Ask]:
    asks = []
    usual = _INSTRUCTIONS[sample.kind]
    for q, i in CELLS:
        part, image, question = f"q{q}-i{i}", sample.images[i], sample.questions[q]
        if sample.kind == "yes_no":
            asks.append(yes_no(part, image, question, wording, usual, " "))
        else:
            asks.append(multiple_choice(part, (image, question), 2, wording, usual, " "))
    return asks


def judge(sample: Group, replies: Mapping[str, Reply]) -> Verdict:
    said = [_said(sample, replies[f"q{q}-i{i}"]) for q, i in CELLS]
    right = [answer == sample.truth[q][i] for answer, (q, i) in zip(said, CELLS, strict=True)]
    return {"kind": sample.kind, "right": right, "unread": said.count(None)}


def _said(sample: Group, reply: Reply) -> int | None:
    if sample.kind == "multiple_choice":
        return chosen(reply, 2)
    yes = said_yes(reply) if reply.scores else first_of_yes_and_no(reply.text)
    return None if yes is None else int(not yes)


def first_of_yes_and_no(text: str) -> bool | None:
    """Which of the two words comes first; None: neither."""
    match = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def score(samples: Sequence[Group], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    scores: dict[str, Any] = _scores(verdicts)
    kinds = dict.fromkeys(sample.kind for sample in samples)
    scores["kinds"] = {kind: _scores([v for v in verdicts if v["kind"] == kind]) for kind in kinds}
    return scores


def _scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    cells = [v["right"] for v in verdicts]  # q0-i0, q0-i1, q1-i0, q1-i1
    return {
        "acc": mean(right for c in cells for right in c),
        "q_acc": mean(ok for c in cells for ok in (c[0] and c[1], c[2] and c[3])),
        "i_acc": mean(ok for c in cells for ok in (c[0] and c[2], c[1] and c[3])),
        "g_acc": mean(all(c) for c in cells),
    }


NATURALBENCH = Benchmark(
    name="naturalbench",
    title="NaturalBench",
    source="arXiv 2410.14669",
    files="the parquet files (images inside), or jsonl with the same fields and image names",
    methods=("generate", "options"),
    lmms_eval="naturalbench",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
