"""One batch seen by several models: each layer's q and k, the groups of rows, what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layer import LayerState
from ..models.observe import observe
from ..models.tokens import IGNORED_LABEL, Inputs, RowChoice, Tokens

ROWS = ("visual", "question", "answer")
COLUMNS = ("visual", "text")
#: Entries of a batch that are no inputs of a model.
NOT_INPUTS = ("labels", "skipped_samples")


@dataclass(frozen=True)
class Seen:
    """What one model did with a batch.

    Attributes:
        states: layer -> q and k of the whole sequence. positions: [B, L], -1: padding.
        tokens: which are valid, which visual. right: [B] bool.
    """

    states: dict[int, LayerState]
    positions: Tensor
    tokens: Tokens
    right: Tensor


def look(model: nn.Module, batch: Inputs) -> Seen:
    """One forward without gradients.

    Raises:
        ValueError: the batch has no labels.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError("the batch has no labels; allowed: labels [B, L], -100 outside of answers")
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    states: dict[int, LayerState] = {}
    kept: list[tuple[RowChoice, Tokens]] = []

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        states[layer] = state
        kept.append((choice, tokens))

    output = observe(model, {**inputs, "use_cache": False}, None, "all", see)
    choice, tokens = kept[0]
    return Seen(states, choice.positions, tokens, answered(output.logits, labels))


def answered(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] bool: greedy decoding would give exactly the labelled tokens of the sample."""
    wanted = labels[:, 1:]
    hit = (logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORED_LABEL)
    return hit.all(dim=1)


def row_groups(tokens: Tokens, labels: Tensor) -> dict[str, Tensor]:
    """[B, L] bool each: visual tokens; rows that predict a labelled token; all other valid rows."""
    answer = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)) & tokens.valid & ~tokens.visual
    return {
        "visual": tokens.visual,
        "question": tokens.valid & ~tokens.visual & ~answer,
        "answer": answer,
    }


def column_groups(tokens: Tokens) -> dict[str, Tensor]:
    """[B, L] bool each: visual tokens; as the control every other valid token."""
    return {"visual": tokens.visual, "text": tokens.valid & ~tokens.visual}


def sample_means(values: Tensor, rows: Tensor) -> Tensor:
    """[B]: mean of values [B, L] over the rows [B, L] bool where they are numbers; nan without any."""
    used = rows & ~values.isnan()
    count = used.sum(-1)
    total = torch.where(used, values.nan_to_num(), 0.0).double().sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def same_tokens(first: Tokens, second: Tokens, names: Mapping[str, str]) -> None:
    """Raises: ValueError: two models see different tokens, which nothing here relates."""
    for what in ("valid", "visual"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise ValueError(
                f"{names['second']} has other {what} tokens than {names['first']}; allowed: models "
                "with one tokenizer and one patch grid"
            )


def move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
