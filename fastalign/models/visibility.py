"""Who sees whom in a layer: rebuilt from O(L) descriptors, checked with the model's mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..select import Visibility
from .capture import Call
from .tokens import Inputs, Tokens
from .view import ModelView

#: Rows of a mask that are compared with the rebuilt visibility.
CHECKED_ROWS = 256


def layer_visibility(
    view: ModelView, layer: int, call: Call, tokens: Tokens, inputs: Inputs
) -> Visibility:
    """The visibility of one decoder layer.

    The window is the one that the layer passed to its attention; chunks are folded into segments,
    counted from the first valid position as transformers counts them. Whether a module says that it
    is causal matters only where no mask is made for it (PaliGemma's says no, and has a mask).
    """
    kind = view.layer_type(layer)
    segments = torch.zeros_like(tokens.valid, dtype=torch.int64)
    if tokens.segments is not None:
        segments = tokens.segments
    if kind == "chunked_attention":
        length = tokens.valid.shape[1]
        place = torch.arange(length, device=tokens.valid.device)
        first = tokens.valid.to(torch.int8).argmax(-1, keepdim=True)
        chunk = torch.div(
            place - first, view.text_config.attention_chunk_size, rounding_mode="floor"
        )
        segments = segments * (length + 1) + chunk.clamp(min=0)
    blocks = view.family.blocks(view.config, inputs, kind)
    return Visibility(
        segments=torch.where(tokens.valid, segments, -1).to(torch.int32),
        blocks=None if blocks is None else blocks.to(torch.int32),
        causal=call.causal or call.mask is not None,
        window=call.window or 0,
    )


def same_visibility(a: Visibility, b: Visibility) -> bool:
    """Whether two layers see the same (synchronises only where both have tensors to compare)."""
    if (a.causal, a.window, a.blocks is None) != (b.causal, b.window, b.blocks is None):
        return False
    if a.blocks is not None and b.blocks is not None and not torch.equal(a.blocks, b.blocks):
        return False
    return torch.equal(a.segments, b.segments)


def check_mask(view: ModelView, layer: int, visibility: Visibility, mask: Any) -> None:
    """Compare the rebuilt visibility with the mask that the model made itself.

    Args:
        mask: bool [B or 1, 1 or H, T, T], float of that shape (hidden where very negative), [B, T]
            padding, or None (purely causal, nothing padded); other kinds are not looked at. At most
            ``CHECKED_ROWS`` rows, evenly spread, are compared; padding rows are not.

    Raises:
        RuntimeError: they differ: the loss would be of another attention than the model's.
    """
    batch, length = visibility.segments.shape
    device = visibility.segments.device
    count = min(length, CHECKED_ROWS)
    rows = torch.arange(count, device=device) * length // max(count, 1)
    valid = visibility.segments >= 0
    if isinstance(mask, Tensor) and mask.dim() == 2:
        wrong = (mask[:, -length:].to(device) != 0) != valid
    else:
        mine = visibility.full(rows.expand(batch, count))
        if isinstance(mask, Tensor) and mask.dim() == 4:
            theirs = mask[:, 0, rows.to(mask.device)].to(device)
            if theirs.dtype != torch.bool:
                theirs = theirs > torch.finfo(theirs.dtype).min / 2
            theirs = theirs[..., :length].expand(batch, count, length)
        elif mask is None:
            keys = torch.arange(length, device=device)
            theirs = (keys <= rows[:, None]) if visibility.causal else torch.ones_like(mine)
            theirs = theirs.expand(batch, count, length)
        else:
            return
        wrong = (mine != theirs) & valid[:, rows, None]
    if bool(wrong.any()):
        raise RuntimeError(
            f"{view.role} layer {layer} ({view.config.model_type}, {view.layer_type(layer)}): the "
            "visibility rebuilt from the batch differs from the model's mask in "
            f"{int(wrong.sum())} of {wrong.numel()} places; allowed: masks made of padding, causal "
            "order, sliding windows, chunks, packed sequences and the bidirectional blocks of the "
            "family"
        )
