"""Visual tokens and query rows of a batch, as the processor made it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .view import ModelView

Inputs = Mapping[str, Any]
#: A name (with ":<n>" for a sample of n rows), a bool mask [B, L], or a function of the batch
#: that returns one.
Rows = str | Tensor | Callable[[Inputs], Tensor]

ROW_NAMES = ("all", "visual", "text", "instruction", "response", "last")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Tokens:
    """What each position of a batch is.

    Attributes:
        valid: [B, L] bool, not padding.
        visual: [B, L] bool, stands for a patch of an image or of a video frame (and is valid).
        segments: [B, L] int64 or None: the packed sequence of each position.
    """

    valid: Tensor
    visual: Tensor
    segments: Tensor | None


@dataclass(frozen=True)
class RowChoice:
    """The query rows of a batch.

    Attributes:
        positions: [B, R] int64, ascending; -1 where a sample has fewer rows than others.
        every: R is the whole sequence, so that q need not be gathered.
        weight: [B, L] float32 or None: how many rows each sampled row stands for.
    """

    positions: Tensor
    every: bool
    weight: Tensor | None

    def slice(self, q: Tensor) -> Tensor:
        """[B, H, R, D] of q [B, H, L, D]; rows that are padding (-1) hold row 0."""
        if self.every:
            return q
        index = self.positions.clamp(min=0)[:, None, :, None].to(q.device)
        return q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))


def read_tokens(view: ModelView, inputs: Inputs) -> Tokens:
    """The tokens of a batch, for one model.

    Args:
        inputs: input_ids [B, L]; attention_mask [B, L] or None; position_ids, from which packed
            sequences are read as transformers reads them (no attention mask, positions that
            restart, and no cache: pass use_cache=False).

    Raises:
        ValueError: what the batch lacks, or has in another form.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        came = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"inputs['input_ids'] is {came}; allowed: a tensor [B, L] (the image tokens are found "
            "in it)"
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        valid = torch.ones_like(ids, dtype=torch.bool)
    elif isinstance(mask, Tensor) and mask.shape == ids.shape:
        valid = mask != 0
    else:
        came = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"inputs['attention_mask'] is {came}; allowed: [B, L], as input_ids, or None"
        )
    if has_images(inputs):
        for name in view.family.needs:
            if name == "image_grid_thw" and "video_grid_thw" in inputs:
                continue
            if inputs.get(name) is None:
                raise ValueError(
                    f"inputs lack {name!r}; allowed for {view.config.model_type} with images: "
                    "every output of its processor (without this one, positions would silently be "
                    "others)"
                )
    if not view.visual_ids:
        raise ValueError(
            f"the {view.role}'s configuration names no image token; allowed: config.image_token_id"
        )
    visual = torch.zeros_like(valid)
    for token in view.visual_ids:
        visual |= ids == token
    return Tokens(valid, visual & valid, _packed(inputs.get("position_ids"), mask))


def has_images(inputs: Inputs) -> bool:
    """Whether the batch carries pixels or their encodings."""
    return any(
        value is not None and (name.startswith("pixel_values") or name == "mm_encoder_outputs")
        for name, value in inputs.items()
    )


def _packed(position_ids: Any, mask: Any) -> Tensor | None:
    if mask is not None or not isinstance(position_ids, Tensor):
        return None
    if position_ids.dim() == 3:  # multimodal rotary embedding: text positions come first, if at all
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    steps = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1)
    return (steps != 1).cumsum(-1)


def choose_rows(
    rule: Rows, tokens: Tokens, inputs: Inputs, generator: torch.Generator | None = None
) -> RowChoice:
    """The query rows that ``rule`` names.

    Args:
        rule: ``"all"`` valid positions; ``"visual"`` tokens; ``"text"``, valid and not visual;
            ``"response"``, where ``labels`` are not -100 (the rows *of* the response's tokens);
            ``"instruction"``, text and not response; ``"last"``, the last valid position. A bool
            mask [B, L] or a function of the batch that returns one. A name may end in ``":n"``: n
            rows a sample, drawn anew each time without replacement from those at or after the
            sample's first visual token (earlier ones see none). Each has the weight (rows / n), so
            that sums and means over rows are unbiased where every such row sees a visual token. The
            cosine of whole maps is a quotient of such sums: consistent, not unbiased.
        generator: of the draw, on the CPU.

    Raises:
        ValueError, TypeError: an unknown name, a missing label, a mask of another shape.
    """
    name, count = rule, None
    if isinstance(rule, str):
        name, _, argument = rule.partition(":")
        count = _count(rule, argument)
        if name == "all" and count is None:
            place = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)
            return RowChoice(torch.where(tokens.valid, place, -1), True, None)
    mask = _row_mask(name, tokens, inputs) & tokens.valid
    if count is None:
        width = max(1, int(mask.sum(-1).max()))
        return RowChoice(_first(mask, width), False, None)
    mask = mask & (tokens.visual.cumsum(-1) > 0)
    noise = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(~mask, -1.0)
    drawn, index = noise.topk(min(count, mask.shape[1]), dim=-1)
    chosen = torch.zeros_like(mask).scatter(1, index, drawn >= 0)
    total, taken = mask.sum(-1, keepdim=True), chosen.sum(-1, keepdim=True)
    weight = (total / taken.clamp(min=1)).expand(mask.shape)
    return RowChoice(_first(chosen, index.shape[1]), False, weight.to(torch.float32))


def _count(rule: str, argument: str) -> int | None:
    if not argument and ":" not in rule:
        return None
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(
            f"rows is {rule!r}; allowed after the colon: a number of rows of at least 1"
        )
    return int(argument)


def _row_mask(rule: Any, tokens: Tokens, inputs: Inputs) -> Tensor:
    if isinstance(rule, str):
        if rule == "all":
            return tokens.valid
        if rule == "visual":
            return tokens.visual
        if rule == "text":
            return ~tokens.visual
        if rule == "last":
            place = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)
            place = torch.where(tokens.valid, place, -1)
            return place == place.amax(-1, keepdim=True)
        if rule in ("response", "instruction"):
            labels = inputs.get("labels")
            if not isinstance(labels, Tensor) or labels.shape != tokens.valid.shape:
                raise ValueError(
                    f"rows is {rule!r} and inputs have no labels of shape "
                    f"{list(tokens.valid.shape)}; allowed: labels [B, L], -100 outside the response"
                )
            response = labels != IGNORED_LABEL
            return response if rule == "response" else ~response & ~tokens.visual
        raise ValueError(
            f"rows is {rule!r}; allowed: {', '.join(map(repr, ROW_NAMES))} (with ':<n>' for a "
            "sample), a bool mask [B, L] or a function of the batch"
        )
    mask = rule if isinstance(rule, Tensor) else rule(inputs) if callable(rule) else None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(rule).__name__
        raise TypeError(
            f"rows gives {kind}; allowed: a name, a bool mask [B, L], or a function to one"
        )
    if mask.shape != tokens.valid.shape:
        raise ValueError(
            f"rows gives a mask of shape {list(mask.shape)}; allowed: {list(tokens.valid.shape)}"
        )
    return mask.to(tokens.valid.device)


def _first(mask: Tensor, width: int) -> Tensor:
    """[B, width] the positions of the True entries in order, -1 after the last."""
    length = mask.shape[1]
    place = torch.arange(length, device=mask.device)
    order = torch.where(mask, place, length).sort(dim=-1).values[:, :width]
    return torch.where(order < length, order, -1)
