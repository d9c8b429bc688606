"""GQA: ten questions in the published file, scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.gqa import GQA
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, judged, number, write_images

#: (question, answer, structural type, semantic type, a reply, is it right)
QUESTIONS = [
    ("Is it overcast?", "no", "verify", "global", "No.", True),
    ("Who is wearing the dress?", "woman", "query", "rel", "Woman", True),
    ("What color is the wall?", "light blue", "query", "attr", " light blue. ", True),
    ("Is the cat black or white?", "black", "choose", "attr", "white", False),
    ("Are there both a cat and a dog?", "yes", "logical", "obj", "yes", True),
    ("Do the cups have the same color?", "no", "compare", "attr", "yes", False),
    ("What is on the table?", "cup", "query", "rel", "a cup", False),  # an exact match
    ("Is there a tree?", "yes", "verify", "obj", "Yes, there is", False),
    ("What animal is it?", "dog", "query", "cat", "DOG", True),
    ("On which side is the lamp?", "left", "query", "rel", "left!", False),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    entries = {
        f"2015{i:02d}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [],
            "equivalent": [f"2015{i:02d}"],
            "question": question,
            "imageId": f"n{i}",
            "isBalanced": True,
            "groups": {"global": None, "local": "x"},
            "answer": answer,
            "semanticStr": "select: scene",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "x", "semantic": semantic, "structural": structural},
            "fullAnswer": f"It is {answer}.",
        }
        for i, (question, answer, structural, semantic, _, _) in enumerate(QUESTIONS)
    }
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text(json.dumps(entries))
    write_images(tmp_path / "images", [f"n{i}.jpg" for i in range(10)])
    return path


def test_scores(data: Path) -> None:
    samples = GQA.read(data, data.parent / "images")
    replies = {f"2015{i:02d}": [q[4]] for i, q in enumerate(QUESTIONS)}
    result = judged(GQA, samples, replies)
    assert result["accuracy"] == 5 / 10
    assert result["open"] == 3 / 5  # woman, light blue, dog; not "a cup", not "left!"
    assert result["binary"] == 2 / 5
    assert result["structural"] == {
        "verify": 1 / 2, "query": 3 / 5, "choose": 0, "logical": 1, "compare": 0,
    }  # fmt: skip
    assert result["semantic"] == {
        "global": 1, "rel": 1 / 3, "attr": 1 / 3, "obj": 1 / 2, "cat": 1,
    }  # fmt: skip
    for index, question in enumerate(QUESTIONS):
        single = judged(GQA, [samples[index]], replies)
        assert single["accuracy"] == question[5], question


def test_an_oracle_gets_everything(data: Path, tmp_path: Path) -> None:
    def oracle(ask: Ask) -> str:
        return QUESTIONS[number(ask.pictures[0])][1].capitalize() + "."

    samples = GQA.read(data.parent, data.parent / "images")
    result = evaluate(GQA, samples, Told(oracle), tmp_path / "out")
    assert result["scores"]["accuracy"] == 1.0


def test_the_prompt_and_another_instruction(data: Path) -> None:
    sample = GQA.read(data, data.parent / "images")[0]
    (ask,) = GQA.ask(sample, Wording())
    assert ask.prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert GQA.ask(sample, Wording(instruction=""))[0].prompt == "Is it overcast?"
    assert GQA.ask(sample, Wording(instruction="Short!"))[0].prompt == "Is it overcast?\nShort!"


def test_malformed_entries_are_named(data: Path) -> None:
    data.write_text('{"12": {"question": "What?", "imageId": "n0"}}')
    with pytest.raises(SampleError, match=r"questions.json, sample '12': lacks 'answer'"):
        GQA.read(data, None)
    data.write_text('{"12": ["What?"]}')
    with pytest.raises(SampleError, match=r"sample '12': is \['What\?'\]; allowed: a mapping"):
        GQA.read(data, None)
