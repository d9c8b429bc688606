"""EvalAI's normalisation and the ten-answer accuracy, against what was worked out by hand."""

from __future__ import annotations

import pytest

from fastalign.evals.vqa import normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Bus", "red bus"),
        ("a", ""),
        ("an apple", "apple"),
        ("Two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("no. 5", "no 5"),
        (".5", ".5"),
        ("10,000", "10000"),
        ("what?", "what"),
        ("t-shirt", "t shirt"),
        ("stop - go", "stop go"),
        ("black/white", "black white"),
        ("coca-cola (zero)", "coca cola 0"),
        ("dont walk", "don't walk"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("mcdonald's", "mcdonald 's"),
        ("line\none\ttwo", "line 1 2"),
        ("U.S.A.", "usa"),
        ("  the   end  ", "end"),
        ("9:30", "9:30"),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_is_the_mean_over_nine_of_ten(agreeing: int, expected: float) -> None:
    """One of ten: it agrees with none of the others, nine see it once: 9 x 1/3 / 10 = 0.3."""
    people = ["Two"] * agreeing + ["three"] * (10 - agreeing)
    assert vqa_accuracy("the 2", people) == pytest.approx(expected)
