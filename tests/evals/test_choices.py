"""The choice parser: the article "A" is no choice."""

from __future__ import annotations

import pytest

from fastalign.evals.choices import parse_choice

CAPTIONS = ("A dog chases a cat", "A cat chases a dog")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("A", 0),
        ("b", 1),
        (" (A) ", 0),
        ("[b]", 1),
        ("A.", 0),
        ("b.", 1),
        ("**B**", 1),
        ("`A`", 0),
        ('"B"', 1),
        ("B)", 1),
        ("A. A dog chases a cat", 0),
        ("(b) the cat", 1),
        ("B: the cat", 1),
        ("A, because the dog runs", 0),
        ("A, a dog runs", 0),
        ("B - the cat chases", 1),
        ("A\nThe dog runs behind the cat.", 0),
        ("B is correct", 1),
        ("A is the better caption.", 0),
        ("B because the cat is behind", 1),
        ("Answer: B", 1),
        ("answer: a", 0),
        ("ANSWER: (b)", 1),
        ("The answer is B", 1),
        ("The answer is B because the cat is behind.", 1),
        ("The answer is A.", 0),
        ("the correct option is (a)", 0),
        ("The correct caption is A: a dog chases a cat", 0),
        ("Option B", 1),
        ("I think it is B.", 1),
        ("I would choose (B) here", 1),
        ("The final answer is: **A**", 0),
    ],
)
def test_a_delimited_letter_is_a_choice(answer: str, index: int) -> None:
    assert parse_choice(answer, 2) == index


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A dog",
        "a dog on a lawn",
        "A (small) dog on a lawn",
        "A cat and a dog, playing",
        "The answer is a dog",
        "The answer is A dog on a lawn",
        "The caption is a bit unclear",
        "This is a photo of a lawn.",
        "A or B",
        "(A) or (B)",
        "A, B",
        "A/B",
        "both A and B",
        "neither",
        "Yes",
        "C",
        "The answer is C.",
        "B-52 bomber",
    ],
)
def test_an_article_or_two_letters_are_none(answer: str) -> None:
    assert parse_choice(answer, 2) is None


def test_letters_go_as_far_as_the_options() -> None:
    assert parse_choice("C", 2) is None
    assert parse_choice("C", 3) == 2
    assert parse_choice("The answer is D", 4) == 3
    with pytest.raises(ValueError, match="allowed: 1 to 26"):
        parse_choice("A", 27)


def test_an_options_text_counts_where_no_letter_does() -> None:
    assert parse_choice("A dog chases a cat.", CAPTIONS) == 0
    assert parse_choice("a cat chases a dog", CAPTIONS) == 1
    assert parse_choice("I see that a cat chases a dog here", CAPTIONS) == 1
    assert parse_choice("A dog", CAPTIONS) is None
    assert parse_choice("A dog chases a cat, or a cat chases a dog", CAPTIONS) is None
    # the letter wins over a text: the caption may be quoted in either order
    assert parse_choice("B. A dog chases a cat", ("A cat chases a dog", "A dog chases a cat")) == 1
    assert parse_choice("dog", ("dog", "black dog")) == 0
    assert parse_choice("the black dog", ("dog", "black dog")) is None  # both texts stand in it
    assert parse_choice("carpet", ("car", "bus")) is None  # whole words
