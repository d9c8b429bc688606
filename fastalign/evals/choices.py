"""Which option did a model's answer name? Letters in free text, where "A" may also be an article.

A letter counts where it is *delimited*: alone, in brackets, before a full stop or a colon, or after
"answer is" and its kin. "A dog on a lawn" names no option; "A. A dog", "(a)" and "The answer is B" do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_ANNOUNCED = r"(?:answer|option|choice|caption|image|picture|letter|it)"
_LINK = r"(?:\s+(?:is|would\s+be|should\s+be))?\s*[:=\-]?\s*"
#: What may follow a letter that might be an article: an end, or punctuation, and no plain word.
_END = r"(?=\s*(?:$|[.,:;!?)\]\"'*}]|\n))"


def parse_choice(answer: str, options: int | Sequence[str]) -> int | None:
    """The index of the option that ``answer`` names, or None.

    In this order: the whole answer is a letter; it begins with a delimited letter; a letter is
    announced ("Answer: B", "the correct option is (c)"); one bracketed letter stands in it; it
    contains exactly one option's text (if texts are given). Two different letters joined by "or",
    "and", "/" or a comma name nothing.

    Args:
        options: how many there are, or their texts.
    """
    texts: Sequence[str] = () if isinstance(options, int) else options
    count = options if isinstance(options, int) else len(options)
    upper = LETTERS[:count]
    if not 1 <= count <= len(LETTERS):
        raise ValueError(f"options is {count}; allowed: 1 to {len(LETTERS)} options")
    said = answer.strip().replace("*", "").replace("`", "")
    if _two_at_once(said, upper):
        return None
    for found in (_whole, _leading, _announced, _bracketed):
        letter = found(said, upper)
        if letter is not None:
            return upper.index(letter.upper())
    return _by_text(said, texts)


def _two_at_once(said: str, upper: str) -> bool:
    """ "A or B", "(A) and (B)", "A, B"; the second is a capital or in brackets, not an article."""
    match = re.match(
        rf"\W*((?i:[{upper}]))\W*?(?:\bor\b|\band\b|[/&,])\s*([(\[]?)((?i:[{upper}]))\b", said
    )
    if match is None or match[1].upper() == match[3].upper():
        return False
    return bool(match[2]) or match[3].isupper()


def _whole(said: str, upper: str) -> str | None:
    match = re.fullmatch(rf"[\W_]*([{upper}])[\W_]*", said, re.IGNORECASE)
    return match[1] if match else None


def _leading(said: str, upper: str) -> str | None:
    """ "(b) the dog", "B. the dog", "B, ...", "B - ...", "B because ...", or a letter on its own line."""
    match = re.match(rf"[(\[{{]\s*([{upper}])\s*[)\]}}]", said, re.IGNORECASE)
    match = match or re.match(rf"([{upper}])[.):](?!\w)", said, re.IGNORECASE)
    match = match or re.match(rf"([{upper}])(?:,|;|\s+[-–—]\s|[ \t]*\n)", said)
    match = match or re.match(rf"([{upper}])\s+(?:is|was|because|since|describes|matches)\b", said)
    return match[1] if match else None


def _announced(said: str, upper: str) -> str | None:
    before = rf"\b{_ANNOUNCED}{_LINK}"
    bracketed = rf"{before}[(\[\"']\s*([{upper}])\s*[)\]\"']"
    delimited = rf"{before}([{upper}]){_END}"
    match = re.search(bracketed, said, re.IGNORECASE) or re.search(delimited, said, re.IGNORECASE)
    if match is None:  # "the answer is B because": a capital other than the article
        plain = upper.replace("A", "").replace("I", "")
        if plain:
            match = re.search(rf"(?i:{before})([{plain}])\b(?!')", said)
    return match[1] if match else None


def _bracketed(said: str, upper: str) -> str | None:
    letters = {m.upper() for m in re.findall(rf"\(\s*([{upper}])\s*\)", said, re.IGNORECASE)}
    return letters.pop() if len(letters) == 1 else None


def _by_text(said: str, texts: Sequence[str]) -> int | None:
    plain = _plain(said)
    if not plain:
        return None
    exact = [i for i, text in enumerate(texts) if _plain(text) == plain]
    if len(exact) == 1:
        return exact[0]
    inside = [i for i, text in enumerate(texts) if f" {_plain(text)} " in f" {plain} "]
    return inside[0] if len(inside) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
