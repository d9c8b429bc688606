"""How a question is put to a model, and what its reply says.

An ``Ask`` is one call of the model: pictures and text, and either options (the model's log-probability
of each is compared) or none (it generates). The benchmarks' files build asks from the functions here
and read replies with them; none of them knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .choices import LETTERS, parse_choice
from .images import Picture

Method = Literal["generate", "options", "match"]
METHODS: Mapping[Method, str] = {
    "generate": "greedy decoding, and the benchmark's own parsing",
    "options": "log-probabilities of the answers that are allowed",
    "match": "log-probability of Yes to 'Does this figure show ...?' for each image and caption",
}

#: What is said after a question (the wordings of LLaVA-1.5, arXiv 2310.03744).
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Wording:
    """What a user may choose.

    Attributes:
        method: how an answer is taken from the model.
        instruction: what stands after each question, instead of the benchmark's own; "" for nothing.
    """

    method: Method = "generate"
    instruction: str | None = None

    def after(self, usual: str, joint: str = "\n") -> str:
        """What follows the question."""
        text = usual if self.instruction is None else self.instruction
        return joint + text if text else ""


@dataclass(frozen=True)
class Ask:
    """One call of the model.

    Attributes:
        part: its name within the sample.
        content: pictures and texts in order.
        options: the answers to compare; empty: generate.
        most: tokens to generate at most.
    """

    part: str
    content: tuple[Picture | str, ...]
    options: tuple[str, ...] = ()
    most: int = 16

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.content if isinstance(part, Picture))

    @property
    def prompt(self) -> str:
        """Its texts."""
        return "\n".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True)
class Reply:
    """What came back: ``text``, or log-probabilities ``scores``, one an option (natural logarithm)."""

    text: str = ""
    scores: tuple[float, ...] = ()

    @property
    def best(self) -> int | None:
        """The likeliest option; None where two are equally likely, or there are none."""
        if not self.scores:
            return None
        top = max(self.scores)
        return self.scores.index(top) if self.scores.count(top) == 1 else None


def short_answer(part: str, image: Picture, question: str, wording: Wording) -> Ask:
    """A question whose answer is a word or a phrase."""
    return Ask(part, (image, question + wording.after(SHORT)))


def yes_no(
    part: str, image: Picture, question: str, wording: Wording, usual: str, joint: str
) -> Ask:
    """A question that is answered with yes or no; ``usual`` follows it after ``joint``."""
    options = YES_NO if wording.method == "options" else ()
    return Ask(part, (image, question + wording.after(usual, joint)), options)


def said_yes(reply: Reply) -> bool | None:
    """Of two options Yes and No; None where they are equally likely."""
    return None if reply.best is None else reply.best == 0


def matches(part: str, image: Picture, caption: str) -> Ask:
    """VQAScore's question (Lin et al., arXiv 2404.01291): its score is the log-probability of Yes."""
    return Ask(
        part, (image, f'Does this figure show "{caption}"? Please answer yes or no.'), YES_NO
    )


def lettered(texts: Sequence[str]) -> str:
    """Options a line each: "A. ..."."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def multiple_choice(
    part: str,
    content: Sequence[Picture | str],
    count: int,
    wording: Wording,
    usual: str = LETTER,
    joint: str = "\n",
) -> Ask:
    """A question with ``count`` lettered options, which its last text lists."""
    *before, last = content
    assert isinstance(last, str)
    options = tuple(LETTERS[:count]) if wording.method == "options" else ()
    return Ask(part, (*before, last + wording.after(usual, joint)), options)


def chosen(reply: Reply, options: int | Sequence[str]) -> int | None:
    """The option that a reply names: the likeliest, or the one parsed from the text; None: none."""
    return reply.best if reply.scores else parse_choice(reply.text, options)


# ------------------------------------------------------------------ two options, both orders

ORDERS = ("right-first", "right-second")


def which_caption(part: str, image: Picture, right: str, wrong: str, wording: Wording) -> list[Ask]:
    """Which of two captions fits, asked in both orders; the first ask has the right one as A."""
    asks = []
    for order, captions in zip(ORDERS, ((right, wrong), (wrong, right)), strict=True):
        question = f"Which caption describes the image correctly?\n{lettered(captions)}"
        asks.append(multiple_choice(f"{part}{order}", (image, question), 2, wording))
    return asks


def which_image(
    part: str, caption: str, right: Picture, wrong: Picture, wording: Wording
) -> list[Ask]:
    """Which of two images a caption fits, asked in both orders. The model must take two images."""
    asks = []
    for order, images in zip(ORDERS, ((right, wrong), (wrong, right)), strict=True):
        question = f"Which image does this caption describe correctly?\n{caption}"
        content = ("Image A:", images[0], "Image B:", images[1], question)
        asks.append(multiple_choice(f"{part}{order}", content, 2, wording))
    return asks


@dataclass(frozen=True)
class Pair:
    """What two replies, one an order, say together.

    Attributes:
        right: of each order alone, whether the right option was chosen.
        first: of each order, whether option A was chosen: a model with a bias says A twice.
        unread: replies that named no option.
        margin: with log-probabilities, the right option's advantage over both orders; a preference for
            a letter cancels.
    """

    right: tuple[bool, bool]
    first: tuple[bool, bool]
    unread: int
    margin: float | None

    @property
    def wins(self) -> bool:
        """By the margin; without log-probabilities only if both orders are right."""
        return all(self.right) if self.margin is None else self.margin > 0


def read_pair(first: Reply, second: Reply, texts: tuple[str, str] | None = None) -> Pair:
    """Replies to the two asks of ``which_caption`` (with ``texts``: right, wrong) or ``which_image``."""
    named = (
        chosen(first, 2 if texts is None else texts),
        chosen(second, 2 if texts is None else texts[::-1]),
    )
    margin = None
    if first.scores and second.scores:
        margin = first.scores[0] - first.scores[1] + second.scores[1] - second.scores[0]
    return Pair(
        right=(named[0] == 0, named[1] == 1),
        first=(named[0] == 0, named[1] == 0),
        unread=named.count(None),
        margin=margin,
    )
