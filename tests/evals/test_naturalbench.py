"""NaturalBench: ten groups in the published columns, scores worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.naturalbench import NATURALBENCH, first_of_yes_and_no
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, write_parquet

KINDS = ["yes_no"] * 7 + ["multiple_choice"] * 3


def row(i: int, kind: str) -> dict[str, Any]:
    """Question 0 is Yes or A on image 0, question 1 on image 1, as in the published data."""
    yes, no = ("Yes", "No") if kind == "yes_no" else ("A", "B")
    tail = "" if kind == "yes_no" else " Option: A: yes, it is; B: no, it is not;"
    return {
        "Index": i,
        "Image_0": image(2 * i),
        "Image_1": image(2 * i + 1),
        "Question_0": f"Is thing {i} red?{tail}",
        "Image_0_Question_0": yes,
        "Image_1_Question_0": no,
        "Question_1": f"Is thing {i} blue?{tail}",
        "Image_0_Question_1": no,
        "Image_1_Question_1": yes,
        "Question_Type": kind,
        "Source": "Flickr30K",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [row(i, kind) for i, kind in enumerate(KINDS)]
    return write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)


#: Replies to (q0 i0), (q0 i1), (q1 i0), (q1 i1); right are Yes, No, No, Yes (A, B, B, A).
REPLIES = {
    "0": ("Yes", "No", "No", "Yes"),  # all
    "1": ("yes.", "No, it is not", "no", "Yes, it is"),  # all
    "2": ("Yes", "Yes", "Yes", "Yes"),  # 2 answers; no question, no image
    "3": ("Yes", "No", "Yes", "Yes"),  # 3; question 0; image 1
    "4": ("Yes", "Yes", "No", "Yes"),  # 3; question 1; image 0
    "5": ("I know not", "No", "No", "Yes"),  # 3 ("know" has no word no); question 1; image 1
    "6": ("No", "Yes", "Yes", "No"),  # 0
    "7": ("A", "B", "(B)", "A."),  # all
    "8": ("A dog", "B", "B", "A"),  # 3: an article; question 1; image 1
    "9": ("A", "A", "B", "B"),  # 2; no question; image 0
}
#: answers 4 4 2 3 3 3 0 4 3 2 = 28 of 40; questions 2 2 0 1 1 1 0 2 1 0 = 10 of 20;
#: images 2 2 0 1 1 1 0 2 1 1 = 11 of 20; groups 3 of 10


def test_scores(data: Path) -> None:
    result = judged(NATURALBENCH, NATURALBENCH.read(data, None), REPLIES)
    assert result["acc"] == 28 / 40
    assert result["q_acc"] == 10 / 20
    assert result["i_acc"] == 11 / 20
    assert result["g_acc"] == 3 / 10
    assert result["kinds"]["multiple_choice"] == {
        "acc": 9 / 12,
        "q_acc": 3 / 6,
        "i_acc": 4 / 6,
        "g_acc": 1 / 3,
    }


def oracle(ask: Ask) -> str:
    """Thing i is red on image 2 i and blue on image 2 i + 1."""
    is_so = (number(ask.pictures[0]) % 2 == 0) == ("red" in ask.prompt)
    if "Option" in ask.prompt:
        return "A" if is_so else "B"
    return "Yes" if is_so else "No"


@pytest.mark.parametrize("method", NATURALBENCH.methods)
def test_an_oracle_gets_everything(data: Path, tmp_path: Path, method: Any) -> None:
    samples = NATURALBENCH.read(data.parent, None)
    result = evaluate(NATURALBENCH, samples, Told(oracle), tmp_path / "o", wording=Wording(method))
    assert [result["scores"][k] for k in ("acc", "q_acc", "i_acc", "g_acc")] == [1, 1, 1, 1]


def test_always_yes_is_half_right_in_no_group(data: Path, tmp_path: Path) -> None:
    def say(ask: Ask) -> str:
        return "A" if "Option" in ask.prompt else "Yes"

    result = evaluate(NATURALBENCH, NATURALBENCH.read(data, None), Told(say), tmp_path / "out")
    assert [result["scores"][k] for k in ("acc", "q_acc", "i_acc", "g_acc")] == [0.5, 0, 0, 0]


def test_prompts_and_the_older_column_name(tmp_path: Path) -> None:
    older = row(0, "yes_no")
    older["Question Type"] = older.pop("Question_Type")
    (sample,) = NATURALBENCH.read(write_parquet(tmp_path / "x.parquet", [older]), None)
    asks = NATURALBENCH.ask(sample, Wording("generate"))
    assert asks[0].prompt == "Is thing 0 red? Please answer Yes or No."
    assert [number(a.pictures[0]) for a in asks] == [0, 1, 0, 1]
    assert asks[3].prompt.startswith("Is thing 0 blue?")


def test_yes_and_no_as_the_published_parser_has_it() -> None:
    assert first_of_yes_and_no("No, yes is wrong") is False
    assert first_of_yes_and_no("It is YES.") is True
    assert first_of_yes_and_no("I know nothing; yesterday") is None


def test_malformed_rows_are_named(tmp_path: Path) -> None:
    bad = row(0, "yes_no") | {"Image_1_Question_1": "A"}
    path = write_parquet(tmp_path / "x.parquet", [row(1, "yes_no"), bad])
    with pytest.raises(
        SampleError, match=r"row 1: 'Image_1_Question_1' is 'A'; allowed: yes or no"
    ):
        NATURALBENCH.read(path, None)
    path = write_parquet(tmp_path / "x.parquet", [row(0, "yes_no") | {"Question_Type": "open"}])
    with pytest.raises(SampleError, match=r"'Question_Type' is 'open'; allowed: yes_no, multiple"):
        NATURALBENCH.read(path, None)
