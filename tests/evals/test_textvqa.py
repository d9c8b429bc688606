"""TextVQA: ten questions in the published file, accuracies worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.textvqa import TEXTVQA
from fastalign.evals.protocols import Ask
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, write_images, write_parquet

#: (question, {answer: how many of ten gave it}, a reply, its accuracy). One person alone counts 0.3,
#: two 0.6, three 0.9, four or more 1: each is compared with the nine others.
QUESTIONS = [
    ("what is the brand?", {"nokia": 10}, "Nokia", 1.0),
    ("what is the number?", {"3": 9, "three": 1}, "Three", 1.0),  # all ten are 3
    ("what does the sign say?", {"stop": 3, "stop sign": 7}, "STOP.", 0.9),
    ("who is the author?", {"j.k. rowling": 8, "rowling": 2}, "Rowling", 0.6),
    ("what time is it?", {"9:30": 9, "9 30": 1}, "9:30", 1.0),
    ("what word is red?", {"exit": 1, "the exit": 0, "no": 9}, "the exit", 0.3),
    ("what is the price?", {"$1,000": 4, "1000": 6}, "$1000", 1.0),
    ("is it legible?", {"unanswerable": 10}, "yes", 0.0),
    ("what drink is it?", {"coca-cola": 5, "coke": 5}, "coca cola", 1.0),
    ("what state?", {"i dont know": 3, "ohio": 7}, "I don't know", 0.9),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    entries = [
        {
            "question": question,
            "image_id": f"003a8ae2ef43b90{i}",
            "image_classes": ["Mobile phone"],
            "flickr_original_url": "https://example.org/o.jpg",
            "flickr_300k_url": "https://example.org/z.jpg",
            "image_width": 8,
            "image_height": 8,
            "answers": [answer for answer, count in answers.items() for _ in range(count)],
            "question_tokens": question.rstrip("?").split(),
            "question_id": 34602 + i,
            "set_name": "val",
        }
        for i, (question, answers, _, _) in enumerate(QUESTIONS)
    ]
    whole = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps(whole | {"data": entries}))
    write_images(tmp_path / "train_images", [f"003a8ae2ef43b90{i}.jpg" for i in range(10)])
    return path


def test_scores(data: Path) -> None:
    samples = TEXTVQA.read(data, data.parent / "train_images")
    replies = {str(34602 + i): [q[2]] for i, q in enumerate(QUESTIONS)}
    # 1 + 1 + 0.9 + 0.6 + 1 + 0.3 + 1 + 0 + 1 + 0.9 = 7.7 of 10
    assert judged(TEXTVQA, samples, replies)["accuracy"] == pytest.approx(0.77)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        single = judged(TEXTVQA, [sample], replies)["accuracy"]
        assert single == pytest.approx(question[3]), question


def test_an_oracle_gets_everything(data: Path, tmp_path: Path) -> None:
    """The most frequent answer, which at least four people gave."""

    def oracle(ask: Ask) -> str:
        answers = QUESTIONS[number(ask.pictures[0])][1]
        return max(answers, key=lambda a: answers[a])

    samples = TEXTVQA.read(data.parent, data.parent / "train_images")
    assert evaluate(TEXTVQA, samples, Told(oracle), tmp_path / "out")["scores"]["accuracy"] == 1.0


def test_from_parquet(tmp_path: Path) -> None:
    row = {
        "image_id": "a", "question_id": 1, "question": "what?", "image": image(9),
        "answers": ["x"] * 10,
    }  # fmt: skip
    (sample,) = TEXTVQA.read(write_parquet(tmp_path / "v.parquet", [row]), None)
    assert (number(sample.image), sample.answers) == (9, ("x",) * 10)


def test_malformed_entries_are_named(data: Path) -> None:
    whole = json.loads(data.read_text())
    whole["data"][2]["answers"].pop()
    data.write_text(json.dumps(whole))
    with pytest.raises(SampleError, match=r"val.json, sample '2': has 9 answers; allowed: 10"):
        TEXTVQA.read(data, None)
    del whole["data"][2]["answers"]
    data.write_text(json.dumps(whole))
    with pytest.raises(SampleError, match=r"lacks 'answers'; the test split has none"):
        TEXTVQA.read(data, None)
    whole["data"][0]["question_id"] = "first"
    data.write_text(json.dumps(whole))
    with pytest.raises(SampleError, match=r"'question_id' is 'first'; allowed: a whole number"):
        TEXTVQA.read(data, None)
