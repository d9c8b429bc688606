"""GQA, testdev balanced (Hudson and Manning, arXiv 1902.09506): exact match of short answers.

An answer is compared in lower case without the full stop at its end, as LLaVA's conversion does
before GQA's own evaluation, which compares the strings. Open questions are those of the structural
type "query"; all others are binary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SampleError
from ..benchmark import Benchmark, Verdict, by_group, mean, unique
from ..files import Row, data_files, read_rows, shown
from ..images import Picture, named_picture, picture
from ..protocols import Ask, Reply, Wording, short_answer

_SUFFIXES = (".jpg", ".png", "")


@dataclass(frozen=True)
class Question:
    """A question, its answer and its types ("" where the file has none)."""

    id: str
    where: str
    image: Picture
    question: str
    answer: str
    structural: str
    semantic: str


def read(data: Path, images: Path | None) -> list[Question]:
    samples: list[Question] = []
    for path in data_files(data, "testdev_balanced_questions.json", "*.parquet"):
        samples += [_sample(row, images) for row in read_rows(path)]
    return unique(samples)


def _sample(row: Row, images: Path | None) -> Question:
    structural, semantic = _types(row)
    return Question(
        id=str(row.values.get("id", row.key)),
        where=row.where,
        image=_image(row, images),
        question=row.text("question"),
        answer=row.text("answer"),
        structural=structural,
        semantic=semantic,
    )


def _image(row: Row, images: Path | None) -> Picture:
    if "image" in row.values:
        return picture(row, "image", root=images, suffixes=_SUFFIXES)
    return named_picture(row.where, row.text("imageId"), images, _SUFFIXES)


def _types(row: Row) -> tuple[str, str]:
    types = row.values.get("types")
    if types is None:
        return "", ""
    if not isinstance(types, dict):
        raise SampleError(row.where, f"'types' is {shown(types)}; allowed: a mapping")
    return str(types.get("structural") or ""), str(types.get("semantic") or "")


def ask(sample: Question, wording: Wording) -> list[Ask]:
    return [short_answer("answer", sample.image, sample.question, wording)]


def normalise(answer: str) -> str:
    """As the answers are compared."""
    return answer.strip().rstrip(".").lower()


def judge(sample: Question, replies: Mapping[str, Reply]) -> Verdict:
    said = normalise(replies["answer"].text)
    return {"said": said, "answer": sample.answer, "right": said == normalise(sample.answer)}


def score(samples: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    right = [v["right"] for v in verdicts]
    scores: dict[str, Any] = {"accuracy": mean(right)}
    typed = [(s, r) for s, r in zip(samples, right, strict=True) if s.structural]
    if typed:
        answers = [r for _, r in typed]
        kinds = ["open" if s.structural == "query" else "binary" for s, _ in typed]
        scores |= by_group(kinds, answers)
        scores["structural"] = by_group([s.structural for s, _ in typed], answers)
        scores["semantic"] = by_group([s.semantic for s, _ in typed], answers)
    return scores


GQA = Benchmark(
    name="gqa",
    title="GQA testdev-balanced",
    source="arXiv 1902.09506",
    files="testdev_balanced_questions.json; images: <imageId>.jpg",
    methods=("generate",),
    lmms_eval="gqa",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
