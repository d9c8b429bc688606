"""POPE: twelve questions in the published files, scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.pope import POPE, SPLITS, reads_as_yes
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, scores, write_images, write_parquet

OBJECTS = ["snowboard", "car", "person", "dog"]
LABELS = ["yes", "no", "yes", "no"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """coco_pope_<split>.json: one object a line, numbered from 1 in each file."""
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(4)]
    for split in SPLITS:
        lines = [
            {
                "question_id": i + 1,
                "image": names[i],
                "text": f"Is there a {OBJECTS[i]} in the image?",
                "label": LABELS[i],
            }
            for i in range(4)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"coco_pope_{split}.json").write_text(text)
    write_images(tmp_path / "val2014", names)
    return tmp_path


#: Labels are yes, no, yes, no.
REPLIES = {
    "random": ("Yes", "No", "Yes.", "no, there is not"),  # all right
    "popular": ("Yes", "Yes", "No", "No"),  # right, false yes, missed, right
    "adversarial": ("Yes", "Yes", "There is a person.", "A dog. No cat."),  # all read as yes
}


def read(data: Path) -> list[Any]:
    return POPE.read(data, data / "val2014")


def test_scores_by_generation(data: Path) -> None:
    replies = {f"{s}/{i + 1}": [r[i]] for s, r in REPLIES.items() for i in range(4)}
    result = judged(POPE, read(data), replies)
    assert result["splits"]["random"] == {
        "accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5,
    }  # fmt: skip
    assert result["splits"]["popular"] == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5,
    }  # fmt: skip
    # 4 times yes: 2 right; the yes ratio is that of the predictions
    assert result["splits"]["adversarial"] == {
        "accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes_ratio": 1,
    }  # fmt: skip
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert result["yes_ratio"] == pytest.approx(2 / 3)


def test_scores_by_log_probability(data: Path) -> None:
    yes, no, tie = scores(-0.2, -1.7), scores(-3.0, -0.1), scores(-0.7, -0.7)
    replies = {f"random/{i + 1}": [r] for i, r in enumerate((yes, yes, no, tie))}
    samples = POPE.read(data / "coco_pope_random.json", data / "val2014")
    result = judged(POPE, samples, replies, Wording("options"))
    # 1 true yes, 1 false yes, 1 missed, a tie is no answer and wrong
    assert result["splits"]["random"] == {
        "accuracy": 0.25, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5,
    }  # fmt: skip
    assert "accuracy" not in result  # one split is not the benchmark


def test_never_yes_has_no_precision(data: Path, tmp_path: Path) -> None:
    result = evaluate(POPE, read(data), Told(lambda ask: "No"), tmp_path / "out")["scores"]
    assert (result["accuracy"], result["precision"], result["f1"], result["yes_ratio"]) == (
        0.5,
        0,
        0,
        0,
    )


@pytest.mark.parametrize("method", POPE.methods)
def test_an_oracle_gets_everything(data: Path, tmp_path: Path, method: Any) -> None:
    def oracle(ask: Ask) -> str:
        assert OBJECTS[number(ask.pictures[0])] in ask.prompt
        return LABELS[number(ask.pictures[0])].capitalize()

    result = evaluate(POPE, read(data), Told(oracle), tmp_path / "out", wording=Wording(method))
    assert result["scores"]["accuracy"] == result["scores"]["f1"] == 1.0
    assert result["scores"]["yes_ratio"] == 0.5


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("NO", True),  # as the published script has it
        ("There is not", False),
        ("Yes. No doubt.", True),  # the first sentence
        ("Yes, no doubt", False),
        ("I see nothing", True),
        ("", True),
    ],
)
def test_answers_are_read_as_the_published_script_reads_them(answer: str, yes: bool) -> None:
    assert reads_as_yes(answer) is yes


def test_replies_without_an_answer_are_counted(data: Path, tmp_path: Path) -> None:
    result = evaluate(POPE, read(data), Told(lambda ask: "I see nothing"), tmp_path / "out")
    assert result["unread"] == 12


def test_from_parquet(tmp_path: Path) -> None:
    row = {
        "id": "0", "question_id": "1", "question": "Is there a dog in the image?", "answer": "yes",
        "image_source": "COCO_val2014_000000310196", "image": image(4), "category": "adversarial",
    }  # fmt: skip
    (sample,) = POPE.read(write_parquet(tmp_path / "test.parquet", [row]), None)
    assert (sample.id, sample.yes, number(sample.image)) == ("adversarial/1", True, 4)


def test_malformed_lines_are_named(data: Path) -> None:
    path = data / "coco_pope_popular.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"no"', '"maybe"'), *lines[2:]]))
    with pytest.raises(
        SampleError, match=r"popular.json, line 2: 'label' is 'maybe'; allowed: yes"
    ):
        read(data)
    path.write_text("\n".join([*lines[:2], lines[2][:20], lines[3]]))
    with pytest.raises(SampleError, match=r"popular.json, line 3: no json"):
        read(data)
