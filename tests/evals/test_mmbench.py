"""MMBench: ten questions in the published tsv, with and without its rotations; scores by hand."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError, SourceError
from fastalign.evals.benchmarks.mmbench import MMBENCH
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, scores, write_parquet

COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]
#: (options, the answer's place, category, ability)
QUESTIONS: list[tuple[Sequence[str], int, str, str]] = [
    (("dog", "cat", "cow", "pig"), 0, "object_localization", "finegrained_perception"),
    (("left", "right"), 1, "spatial_relationship", "relation_reasoning"),
    (("red", "blue", "green"), 2, "attribute_recognition", "finegrained_perception"),
    (("one", "two", "three", "four"), 3, "object_localization", "finegrained_perception"),
    (("sad", "glad"), 0, "image_emotion", "coarse_perception"),
    (("map", "photo"), 1, "image_style", "coarse_perception"),
    (("sea", "wood"), 0, "image_scene", "coarse_perception"),
    (("a dog", "a cat"), 1, "object_localization", "finegrained_perception"),
    (("oil", "ink"), 0, "image_style", "coarse_perception"),
    (("above", "below"), 1, "spatial_relationship", "relation_reasoning"),
]


def row(i: int, turn: int = 0) -> dict[str, Any]:
    options, answer, category, ability = QUESTIONS[i]
    turned = [*options[turn:], *options[:turn]] + [""] * (4 - len(options))
    return {
        "index": 241 + i + 1_000_000 * turn,
        "question": f"What is number {i}?",
        "hint": "Read the\npicture." if i == 2 else "nan",
        **dict(zip("ABCD", turned, strict=True)),
        "answer": "ABCD"[(answer - turn) % len(options)],
        "category": category,
        "image": base64.b64encode(image(i)).decode(),
        "source": "x",
        "l2-category": ability,
        "comment": "nan",
        "split": "dev",
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "MMBench_DEV_EN.tsv", [row(i) for i in range(10)])


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    rows = [row(i, n) for n in range(4) for i in range(10) if n < len(QUESTIONS[i][0])]
    for entry in rows:
        if entry["index"] >= 1_000_000:  # some releases: another row's index for its image
            entry["image"] = str(entry["index"] % 1_000_000)
    return write(tmp_path / "mmbench_dev_20230712.tsv", rows)


#: Right answers by rotation: 0: A D C B; 1: B A; 2: C B A; 3: D C B A; 4: A B; 5: B A; 6: A B; 7: B A;
#: 8: A B; 9: B A.
REPLIES = {
    "241": ("A", "D", "C", "B"),  # all
    "242": ("B", "B"),  # the first only: a bias
    "243": ("C. green", "B", "(A)"),  # all
    "244": ("D", "C", "B", "B"),  # three of four
    "245": ("sad", "B. sad"),  # its text: all
    "246": ("map", "A"),  # wrong text
    "247": ("A", "The answer is B."),  # all
    "248": ("A cat", "A cat"),  # the text "a cat", B and then A: all
    "249": ("A", "A"),
    "250": ("below", "It is a picture"),  # the second names nothing
}
#: all rotations right: 241, 243, 245, 247, 248; the first one: all but 246


def check(result: dict[str, Any]) -> None:
    assert result["accuracy"] == 5 / 10
    assert result["vanilla"] == 9 / 10
    assert result["categories"] == {
        "object_localization": 2 / 3,  # 241, 248 of 241, 244, 248
        "spatial_relationship": 0,
        "attribute_recognition": 1,
        "image_emotion": 1,
        "image_style": 0,
        "image_scene": 1,
    }
    assert result["abilities"] == {
        "finegrained_perception": 3 / 4,
        "relation_reasoning": 0,
        "coarse_perception": 2 / 4,
    }


def test_scores_with_the_rotations_of_the_file(rotated: Path) -> None:
    check(judged(MMBENCH, MMBENCH.read(rotated, None), REPLIES))


def test_scores_with_rotations_made_here(plain: Path) -> None:
    check(judged(MMBENCH, MMBENCH.read(plain, None), REPLIES))


def test_rotations_made_here_are_the_files(plain: Path, rotated: Path) -> None:
    made, given = MMBENCH.read(plain, None), MMBENCH.read(rotated, None)
    assert [s.rotations for s in made] == [s.rotations for s in given]
    assert [number(s.image) for s in given] == list(range(10))


def test_scores_by_log_probability(plain: Path) -> None:
    samples = MMBENCH.read(plain, None)[:2]
    replies = {
        "241": [
            scores(-0.1, -3, -3, -3), scores(-3, -3, -3, -0.1), scores(-3, -3, -0.1, -3),
            scores(-3, -0.1, -3, -3),
        ],
        "242": [scores(-3, -0.1), scores(-0.7, -0.7)],  # a tie is no answer
    }  # fmt: skip
    result = judged(MMBENCH, samples, replies, Wording("options"))
    assert (result["accuracy"], result["vanilla"]) == (0.5, 1.0)


@pytest.mark.parametrize("method", MMBENCH.methods)
def test_an_oracle_gets_everything(rotated: Path, tmp_path: Path, method: Any) -> None:
    def oracle(ask: Ask) -> str:
        options, answer, *_ = QUESTIONS[number(ask.pictures[0])]
        return next(x for x in "ABCD" if f"\n{x}. {options[answer]}\n" in ask.prompt)

    samples = MMBENCH.read(rotated, None)
    result = evaluate(MMBENCH, samples, Told(oracle), tmp_path / "out", wording=Wording(method))
    assert result["scores"]["accuracy"] == result["scores"]["vanilla"] == 1.0


def test_always_b_survives_no_rotation(rotated: Path, tmp_path: Path) -> None:
    result = evaluate(MMBENCH, MMBENCH.read(rotated, None), Told(lambda ask: "B"), tmp_path / "out")
    assert result["scores"]["accuracy"] == 0
    assert result["scores"]["vanilla"] == 4 / 10


def test_the_prompt(plain: Path) -> None:
    asks = MMBENCH.ask(MMBENCH.read(plain, None)[2], Wording("options"))
    assert asks[0].prompt == (
        "Read the\npicture.\nWhat is number 2?\nA. red\nB. blue\nC. green\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert "A. blue\nB. green\nC. red\n" in asks[1].prompt
    assert [ask.options for ask in asks] == [("A", "B", "C")] * 3


def test_from_parquet(tmp_path: Path) -> None:
    values = row(1) | {"image": image(1), "hint": None, "C": None, "D": None, "L2-category": "x"}
    (sample,) = MMBENCH.read(write_parquet(tmp_path / "dev.parquet", [values]), None)
    assert (sample.id, len(sample.rotations), number(sample.image)) == ("242", 2, 1)


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    rows = [row(i) for i in range(4)]
    with pytest.raises(SampleError, match=r"x.tsv, line 2: 'answer' is 'E'; allowed: A, B, C, D"):
        MMBENCH.read(write(path, [rows[0] | {"answer": "E"}]), None)
    with pytest.raises(SampleError, match=r"x.tsv, line 3: has no answer; the test split has none"):
        MMBENCH.read(write(path, [rows[0], rows[1] | {"answer": ""}]), None)
    write(path, rows)
    path.write_text(path.read_text().replace("\tdev\n", "\n"))
    with pytest.raises(SampleError, match=r"x.tsv, line 2: has 13 fields; allowed: 14"):
        MMBENCH.read(path, None)
    write(path, [rows[2], rows[3] | {"index": "third"}])
    with pytest.raises(SampleError, match=r"x.tsv, line 4: 'index' is 'third'; allowed: a whole"):
        MMBENCH.read(path, None)
    write(path, [rows[0], rows[1] | {"image": "not base64!"}])
    (_, second) = MMBENCH.read(path, None)
    with pytest.raises(SampleError, match=r"line 3: 'image' is no base64"):
        second.image.load()
    with pytest.raises(SampleError, match=r"line 2: question 241 has the rounds \[0, 2\]"):
        MMBENCH.read(write(path, [row(0), row(0, 2)]), None)
    with pytest.raises(SourceError, match=r"x.csv; allowed: a file with one of the suffixes"):
        MMBENCH.read(write(tmp_path / "x.csv", rows), None)
