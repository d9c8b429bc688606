"""The student's attention mixed with the teacher's, or replaced by it, in chosen layers at inference.

The paper's question (CompoDistill, arXiv 2510.12184, figure 4): would the student answer better if it
looked where the teacher looks, nothing else changed? This is the only place that materialises attention
of all heads; it is for small models and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layer import LayerState, materialise
from ..models.matching import Rule, match_layers
from ..models.observe import observe
from ..models.tokens import Inputs, RowChoice, Tokens
from ..models.view import ModelView
from ..spec import AlignSpec

NAME = "fastalign_mixed"
KINDS = ("map", "place")
_MEAN = AlignSpec()

#: attention module -> what is done to its probabilities [B, H, T, T]
_changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {}


@dataclass(frozen=True)
class Mix:
    """What is changed.

    Attributes:
        weight: 0: nothing; 1: the teacher's instead of the student's.
        layers: which student layers, and which teacher layers each gets (``match_layers``).
        kind: ``"map"``: a head's attention to the visual tokens becomes (1 - w) its own + w the
            teacher's (mean over heads and window, joint softmax), and the rest of the row is scaled so
            that it still sums to 1. ``"place"``: each head keeps how much it looks at the image, and
            only the distribution over the image is mixed.
        only: of the matched student layers; None: all.
    """

    weight: float
    layers: Rule = "uniform"
    kind: str = "map"
    only: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight!r}; allowed: 0 to 1")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; allowed: {', '.join(map(repr, KINDS))}")


@torch.no_grad()
def mixed_forward(student: nn.Module, teacher: nn.Module, inputs: Inputs, mix: Mix) -> Any:
    """The student's output for a batch with the same tokens in both models.

    Raises:
        ValueError: layers that do not exist; attention sinks or dropout in the student's attention.
    """
    view = ModelView("student", student)
    other = ModelView("teacher", teacher)
    matching = match_layers(mix.layers, list(view.attentions), list(other.attentions))
    chosen = matching if mix.only is None else {i: matching.get(i, ()) for i in mix.only}
    for layer, group in chosen.items():
        if not group:
            raise ValueError(f"only names layer {layer}; allowed: {sorted(matching)}")
    wanted = sorted({t for group in chosen.values() for t in group})
    maps: dict[int, Tensor] = {}
    visual: list[Tensor] = []

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        found = materialise(state, choice.positions, tokens.visual, _MEAN)
        maps[layer] = _in_place(found[:, 0], tokens.visual)
        visual.append(tokens.visual)

    observe(teacher, {**inputs, "use_cache": False}, wanted, "all", see)
    changes = {
        view.attentions[i]: _change(
            torch.stack([maps[t] for t in group]).mean(0), visual[0], mix.weight, mix.kind
        )
        for i, group in chosen.items()
    }
    with _mixing(view, changes):
        return student(**{**inputs, "use_cache": False})


def _change(target: Tensor, visual: Tensor, weight: float, kind: str) -> Callable[[Tensor], Tensor]:
    """Probabilities [B, H, T, T] to the mixed ones.

    Args:
        target: [B, T, T] the teacher's attention, 0 outside the visual columns. visual: [B, T] bool.
    """
    inside = visual[:, None, None, :]

    def change(probabilities: Tensor) -> Tensor:
        theirs = target[:, None].to(probabilities)
        mass = (probabilities * inside).sum(-1, keepdim=True)
        total = theirs.sum(-1, keepdim=True)
        if kind == "place":
            theirs = torch.where(total > 0, theirs / total.clamp(min=1e-30) * mass, probabilities)
            mixed = (1 - weight) * probabilities + weight * theirs
            return torch.where(inside, mixed, probabilities)
        mixed = (1 - weight) * probabilities + weight * theirs
        left = 1 - (mixed * inside).sum(-1, keepdim=True)
        # A row that looked at the image alone has nothing to scale: it is renormalised as it is.
        scale = torch.where(mass < 1, left / (1 - mass).clamp(min=1e-30), 0.0)
        mixed = torch.where(inside, mixed, probabilities * scale)
        return torch.where(total > 0, mixed / mixed.sum(-1, keepdim=True), probabilities)

    return change


def _in_place(maps: Tensor, visual: Tensor) -> Tensor:
    """[B, T, T] of [B, T, V]: ordinals of a sample's visual tokens to their positions."""
    index = (visual.cumsum(-1) - 1).clamp(min=0)[:, None, :].expand(-1, maps.shape[1], -1)
    return maps.gather(2, index) * visual[:, None, :]


# ------------------------------------------------------------------------ the switch


@contextmanager
def _mixing(
    view: ModelView, changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """The model's attention is materialised inside, and changed in the modules of ``changes``."""
    _register()
    before = view.text_config._attn_implementation
    view.text_config._attn_implementation = NAME
    _changes.update(changes)
    try:
        yield
    finally:
        for module in changes:
            del _changes[module]
        view.text_config._attn_implementation = before


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **passed: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out: q, k, v [B, H or K, T, D] -> [B, T, H, D]."""
    if dropout or passed.get("s_aux") is not None:
        what = "dropout" if dropout else "attention sinks"
        raise ValueError(f"the student's attention has {what}; allowed: evaluation mode, no sinks")
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    probabilities = scores.softmax(-1, dtype=torch.float32)
    change = _changes.get(module)
    if change is not None:
        probabilities = change(probabilities)
    out = probabilities.to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), probabilities
