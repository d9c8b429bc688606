"""TextVQA (Singh et al., arXiv 1904.08920): VQA accuracy against ten answers, normalised as on EvalAI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SampleError
from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import Row, data_files, read_rows, shown
from ..images import Picture, named_picture, picture
from ..protocols import Ask, Reply, Wording, short_answer
from ..vqa import normalise, vqa_accuracy

_SUFFIXES = (".jpg", ".png", "")
PEOPLE = 10


@dataclass(frozen=True)
class Question:
    """A question and ten people's answers."""

    id: str
    where: str
    image: Picture
    question: str
    answers: tuple[str, ...]


def read(data: Path, images: Path | None) -> list[Question]:
    samples: list[Question] = []
    for path in data_files(data, "TextVQA_*val.json", "*.parquet"):
        samples += [_sample(row, images) for row in read_rows(path)]
    return unique(samples)


def _sample(row: Row, images: Path | None) -> Question:
    return Question(
        id=str(row.number("question_id")),
        where=row.where,
        image=_image(row, images),
        question=row.text("question"),
        answers=_answers(row),
    )


def _image(row: Row, images: Path | None) -> Picture:
    if "image" in row.values:
        return picture(row, "image", root=images)
    return named_picture(row.where, row.text("image_id"), images, _SUFFIXES)


def _answers(row: Row) -> tuple[str, ...]:
    if "answers" not in row.values:
        raise SampleError(row.where, "lacks 'answers'; the test split has none, use validation")
    answers = row.values["answers"]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise SampleError(row.where, f"'answers' is {shown(answers)}; allowed: a list of texts")
    if len(answers) != PEOPLE:
        raise SampleError(row.where, f"has {len(answers)} answers; allowed: {PEOPLE}")
    return tuple(answers)


def ask(sample: Question, wording: Wording) -> list[Ask]:
    return [short_answer("answer", sample.image, sample.question, wording)]


def judge(sample: Question, replies: Mapping[str, Reply]) -> Verdict:
    text = replies["answer"].text
    return {"said": normalise(text), "accuracy": vqa_accuracy(text, sample.answers)}


def score(samples: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {"accuracy": mean(v["accuracy"] for v in verdicts)}


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA validation",
    source="arXiv 1904.08920",
    files="TextVQA_0.5.1_val.json; images: <image_id>.jpg (train_images); or the parquet files",
    methods=("generate",),
    lmms_eval="textvqa_val",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
