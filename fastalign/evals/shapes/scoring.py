"""Accuracy of a LLaVA model on the shapes world: per type, per detail, per minimal pair.

An answer counts when greedy decoding would give exactly it. Teacher forcing decides that in one
forward pass: the decoded tokens are the argmax at every position of ``answer </s>`` exactly when
each argmax is the answer's own token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fastalign.evals.shapes.dataset import (
    IGNORE,
    EvaluationSet,
    Item,
    batches,
    pack,
    pixel_values,
)
from fastalign.evals.shapes.questions import COMPOSITION, TYPES, chance

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """``right`` of ``asked`` questions."""

    right: int = 0
    asked: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else float("nan")

    def __add__(self, right: bool) -> Score:
        return replace(self, right=self.right + right, asked=self.asked + 1)


@dataclass(frozen=True)
class Report:
    """Scores by type, by "type/detail" and of whole minimal pairs by their kind.

    A pair counts when the question and its twin are both right (chance 1/4 for a guesser who
    tosses a coin, 0 for one who always says the same).
    """

    types: dict[str, Score] = field(default_factory=dict)
    details: dict[str, Score] = field(default_factory=dict)
    pairs: dict[str, Score] = field(default_factory=dict)

    @property
    def composition(self) -> float:
        """Mean accuracy of the types that need composition."""
        return sum(self.types[t].accuracy for t in COMPOSITION) / len(COMPOSITION)

    def as_dict(self) -> dict[str, dict[str, float] | float]:
        """Plain numbers, for a JSON file."""
        groups = {"types": self.types, "details": self.details, "pairs": self.pairs}
        accuracies: dict[str, dict[str, float] | float] = {
            name: {key: score.accuracy for key, score in group.items()}
            for name, group in groups.items()
        }
        accuracies["chance"] = {t: chance(t) for t in self.types}
        if all(t in self.types for t in COMPOSITION):
            accuracies["composition"] = self.composition
        return accuracies


def composition_chance() -> float:
    return sum(chance(t) for t in COMPOSITION) / len(COMPOSITION)


def evaluate(
    model: LlavaForConditionalGeneration,
    data: EvaluationSet,
    *,
    batch_size: int = 128,
    twins: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Score a model; with ``twins`` the minimal pairs' other questions are asked too.

    ``progress(done, total)`` is called after each batch. The model's mode is left as it was.
    """
    items = list(data.items)
    if twins:
        items += [twin for item in data.items if (twin := _twin(item)) is not None]
    right = answers_right(model, data, items, batch_size=batch_size, progress=progress)

    types: defaultdict[str, Score] = defaultdict(Score)
    details: defaultdict[str, Score] = defaultdict(Score)
    pairs: defaultdict[str, Score] = defaultdict(Score)
    twin_right = iter(right[len(data.items) :])
    for item, ok in zip(data.items, right, strict=False):
        question = item.question
        types[question.type] += ok
        if question.detail:
            details[f"{question.type}/{question.detail}"] += ok
        if twins and question.kind:
            pairs[question.kind] += ok and next(twin_right)
    in_order = {t: types[t] for t in TYPES if t in types}
    return Report(in_order, dict(details), dict(pairs))


@torch.no_grad()
def answers_right(
    model: LlavaForConditionalGeneration,
    data: EvaluationSet,
    items: Sequence[Item],
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> list[bool]:
    """For each item: would greedy decoding give exactly the answer?"""
    was_training = model.training
    model.eval()
    right: list[bool] = []
    for part in batches(len(items), batch_size):
        batch = pack_single(items[part])
        scenes = [data.scenes[item.scene] for item in items[part]]
        logits = model(
            input_ids=batch["input_ids"], pixel_values=pixel_values(scenes), use_cache=False
        ).logits
        labels = batch["labels"][:, 1:]
        hit = (logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE)
        right += hit.all(dim=1).tolist()
        if progress:
            progress(len(right), len(items))
    model.train(was_training)
    return right


def pack_single(items: Sequence[Item]) -> dict[str, Tensor]:
    """One question per row, padded on the right to the longest (which a causal model ignores)."""
    from fastalign.evals.shapes.dataset import VISUAL_TOKENS, encode

    longest = max(len(encode(i.question.text)) + len(encode(i.question.answer)) for i in items)
    return pack([[item.question] for item in items], VISUAL_TOKENS + 2 + longest)


def _twin(item: Item) -> Item | None:
    question = item.question
    if question.twin is None:
        return None
    answer = "no" if question.answer == "yes" else "yes"
    twin = replace(question, text=question.twin, twin=question.text, answer=answer)
    return Item(item.scene, twin)
