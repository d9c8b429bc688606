"""VQA accuracy: an answer's agreement with ten people's, after EvalAI's normalisation.

Source: the VQA evaluation (Antol et al., arXiv 1505.00468; visualqa.org/evaluation) in the form that
the TextVQA challenge on EvalAI uses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

#: Contractions whose apostrophe people leave out. Words that are others without it (its, wed, shed,
#: well, were, ill, hell, shell, id) are not among them; nor are I'm and I've, whose entries in the
#: published table have a capital that no lower-case answer can meet.
_SINGLE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
how'd how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
#: With two: either of them may be missing.
_DOUBLE = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
you'd've"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        first, second = word.index("'"), word.rindex("'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    # "y'all'd've" has three; and one entry of the published table goes the other way.
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table["somebody'd"] = "somebodyd"
    return table


_CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as EvalAI compares it.

    Lower case; no commas, question marks, articles or punctuation; numbers as digits; apostrophes put
    back into contractions. A mark between two letters becomes a space, one beside a space vanishes; a
    point stays only before a digit.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_NUMBERS.get(word, word) for word in out.split())
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over people, each left out in turn, of min(1, how many of the others agree / 3)."""
    said = normalise(answer)
    agrees = [normalise(person) == said for person in people]
    total = sum(agrees)
    return sum(min(1.0, (total - own) / 3) for own in agrees) / len(agrees)
