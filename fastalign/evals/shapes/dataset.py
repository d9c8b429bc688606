"""Tensors for training and evaluation.

Training packs many questions about one image into one conversation,
``<s> <image> x 36 question answer </s> question answer </s> ...``, because supervised tokens are
what is scarce. Evaluation asks one question per sequence, so that no answer leaks into another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastalign.evals.shapes.questions import STRATA, TYPES, Question, ask, ask_any
from fastalign.evals.shapes.render import render_batch
from fastalign.evals.shapes.tokenizer import PATCH, build_tokenizer
from fastalign.evals.shapes.world import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    Split,
    make_scene,
)

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""The label of a position that no loss looks at."""
VISUAL_TOKENS = (IMAGE_SIZE // PATCH) ** 2


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """float32 [N, 3, H, W] in [-1, 1]: what the shipped image processor gives."""
    images = torch.from_numpy(render_batch(list(scenes)))
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def patch_labels(scenes: Sequence[Scene]) -> Tensor:
    """int64 [N, 36, 2]: colour and shape (0 = empty) of the cell that a patch lies in."""
    per_cell = IMAGE_SIZE // PATCH // 3
    labels = np.zeros((len(scenes), IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH, 2), np.int64)
    for n, scene in enumerate(scenes):
        for t in scene.things:
            y, x = t.row * per_cell, t.column * per_cell
            ids = 1 + COLOURS.index(t.colour), 1 + SHAPES.index(t.shape)
            labels[n, y : y + per_cell, x : x + per_cell] = ids
    return torch.from_numpy(labels.reshape(len(scenes), -1, 2))


# --- training: packed conversations -----------------------------------------------------------


def draw_questions(
    scene: Scene, rng: random.Random, count: int, weights: dict[str, float]
) -> list[Question]:
    """``count`` different questions, their types drawn by weight."""
    types, shares = list(weights), list(weights.values())
    questions: dict[str, Question] = {}
    for _ in range(20 * count):
        question = ask_any(rng.choices(types, shares)[0], scene, rng)
        if question is not None and question.text not in questions:
            questions[question.text] = question
            if len(questions) == count:
                break
    return list(questions.values())


def pack(conversations: Sequence[Sequence[Question]], length: int) -> dict[str, Tensor]:
    """int64 [N, length] input_ids and labels, padded on the right; only answers have labels.

    Questions that do not fit entirely are left out.
    """
    bos, eos, pad, image = special_ids()
    ids = np.full((len(conversations), length), pad, np.int64)
    labels = np.full_like(ids, IGNORE)
    for n, questions in enumerate(conversations):
        head = [bos] + [image] * VISUAL_TOKENS
        ids[n, : len(head)] = head
        end = len(head)
        for question in questions:
            asked, answered = encode(question.text), (*encode(question.answer), eos)
            stop = end + len(asked) + len(answered)
            if stop > length:
                continue
            ids[n, end:stop] = (*asked, *answered)
            labels[n, end + len(asked) : stop] = answered
            end = stop
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


# --- evaluation: balanced questions, one per sequence -------------------------------------------


@dataclass(frozen=True)
class Item:
    """One evaluation question; ``scene`` indexes the set's scenes."""

    scene: int
    question: Question


@dataclass(frozen=True)
class EvaluationSet:
    scenes: list[Scene]
    items: list[Item]

    def of_type(self, type: str) -> list[Item]:
        return [item for item in self.items if item.question.type == type]


def evaluation_set(
    split: Split, per_type: int, *, seed: int = 0, types: Sequence[str] = TYPES
) -> EvaluationSet:
    """``per_type`` questions of each type, with the strata in exactly their shares (rounded up).

    Every question takes the next scene that offers its stratum, so that scenes are many.
    """
    rng = random.Random(f"shapes questions/{seed}/{split}")
    scenes: list[Scene] = []
    items: list[Item] = []
    for type in types:
        wanted = [s for s in STRATA[type] for _ in range(_quota(type, s.share, per_type))]
        rng.shuffle(wanted)
        for number, stratum in enumerate(wanted[:per_type]):
            index = number
            while True:
                while index >= len(scenes):
                    scenes.append(make_scene(split, len(scenes), seed=seed))
                question = ask(type, scenes[index], rng, stratum)
                if question is not None:
                    break
                index += 1
            items.append(Item(index, question))
    return EvaluationSet(scenes, items)


def _quota(type: str, share: float, per_type: int) -> int:
    total = sum(s.share for s in STRATA[type])
    return -int(-share * per_type // total)


def prompts(items: Sequence[Item]) -> dict[str, Tensor]:
    """int64 [N, T] input_ids and attention_mask of the questions alone, padded on the left."""
    return prompt_batch([item.question.text for item in items])


def prompt_batch(texts: Sequence[str]) -> dict[str, Tensor]:
    bos, _, pad, image = special_ids()
    rows = [[bos] + [image] * VISUAL_TOKENS + list(encode(text)) for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def batches(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@lru_cache(maxsize=1)
def _tokenizer():  # type: ignore[no-untyped-def]
    return build_tokenizer()


@lru_cache(maxsize=1)
def special_ids() -> tuple[int, int, int, int]:
    """(bos, eos, pad, image)"""
    tokenizer = _tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, image


@cache
def encode(text: str) -> tuple[int, ...]:
    """Token ids without specials; a cache makes packing fast (there are few thousand texts)."""
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)
