"""Who sees whom in a layer: rebuilt from O(L) descriptors, checked with the model's mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..select import Visibility
from .calls import Call
from .tokens import Inputs, Tokens
from .view import ModelView

#: Rows of a mask that are compared with the rebuilt visibility.
CHECKED_ROWS = 256


def layer_visibility(
    view: ModelView, layer: int, call: Call, tokens: Tokens, inputs: Inputs, positions: Tensor
) -> Visibility:
    """The visibility of one decoder layer.

    The window is the one that the layer passed to its attention; chunks are folded into segments,
    counted from the first valid position as transformers counts them. Whether a module says that it
    is causal matters only where no mask is made for it (PaliGemma's says no, and has a mask). Flash
    attention gets no such mask: it has neither blocks nor chunks, whatever the family, and finds
    packed sequences by itself.

    Args:
        positions: [B, R] the rows that the visibility is for, -1: none.

    Raises:
        ValueError: flash attention asked for what it would leave out (chunks), or for packed sequences
            that run over the end of a sample; rows in a block that the layer's window cuts.
    """
    kind = view.layer_type(layer)
    chunked = kind == "chunked_attention"
    if call.flash:
        if chunked and tokens.valid.shape[1] > view.text_config.attention_chunk_size:
            raise ValueError(
                f"{view.role} layer {layer} has chunked attention, which flash attention leaves out; "
                "allowed: sdpa or flex_attention for this model"
            )
        segments = _flash_segments(call, tokens.valid)
        blocks, causal = None, call.causal
    else:
        segments = tokens.segments
        blocks = view.family.blocks(view.config, inputs, kind)
        causal = call.causal or call.mask is not None
        cut = _cut(view, blocks, call)
        if blocks is not None and cut is not None:
            _refuse_cut_rows(view, layer, call, blocks, cut, positions)
            blocks = torch.where(cut, -1, blocks)  # which matter to their own rows alone
    if segments is None:
        segments = torch.zeros_like(tokens.valid, dtype=torch.int64)
    if chunked and not call.flash:
        length = tokens.valid.shape[1]
        place = torch.arange(length, device=tokens.valid.device)
        first = tokens.valid.to(torch.int8).argmax(-1, keepdim=True)
        chunk = torch.div(
            place - first, view.text_config.attention_chunk_size, rounding_mode="floor"
        )
        segments = segments * (length + 1) + chunk.clamp(min=0)
    return Visibility(
        segments=torch.where(tokens.valid, segments, -1).to(torch.int32),
        blocks=None if blocks is None else blocks.to(torch.int32),
        causal=causal,
        window=call.window or 0,
    )


def _cut(view: ModelView, blocks: Tensor | None, call: Call) -> Tensor | None:
    """[B, L] bool: tokens of blocks longer than the window, of which a row does not see all; None: none.

    The loss knows blocks that see themselves as a whole.
    """
    if blocks is None or not call.window or not view.family.cut_blocks:
        return None
    ids = blocks.long() + 1  # 0: in no block
    sizes = torch.zeros(len(ids), int(ids.max()) + 1, dtype=torch.int64, device=ids.device)
    sizes.scatter_add_(1, ids, torch.ones_like(ids))
    cut = (sizes.gather(1, ids) > call.window) & (ids > 0)
    return cut if bool(cut.any()) else None


def _refuse_cut_rows(
    view: ModelView, layer: int, call: Call, blocks: Tensor, cut: Tensor, positions: Tensor
) -> None:
    at = positions.to(cut.device)
    rows = cut.gather(1, at.clamp(min=0)) & (at >= 0)
    if not bool(rows.any()):
        return
    size = max(
        int((block == block[here][0]).sum())
        for block, here in zip(blocks, cut, strict=True)
        if here.any()
    )
    raise ValueError(
        f"{view.role} layer {layer} has a sliding window of {call.window}, and rows holds tokens of an "
        f"image of {size}, whose later tokens do not see its first (the loss cannot state that); allowed "
        "for such images: rows without visual tokens ('text', 'instruction', 'response', 'last')"
    )


def _flash_segments(call: Call, valid: Tensor) -> Tensor | None:
    """[B, L] the packed sequences that flash attention sees, as transformers tells it of them.

    With a padding mask there are none. ``cu_seq_lens`` count through the flattened batch; without
    them, positions of a batch of one that are not consecutive start anew at their smallest value.
    """
    if call.mask is not None:
        return None
    batch, length = valid.shape
    if call.starts is not None:
        inner = call.starts.to(valid.device)
        samples = torch.arange(0, valid.numel(), length, device=inner.device)
        if not bool(torch.isin(samples, inner).all()):
            raise ValueError(
                f"cu_seq_lens_q is {inner.tolist()} for a batch of {[batch, length]}; allowed: packed "
                "sequences that end where a sample ends"
            )
        place = torch.arange(valid.numel(), device=inner.device)
        return torch.searchsorted(inner.long(), place, right=True).reshape(batch, length)
    at = call.positions
    if at is None or at.dim() != 2 or batch != 1 or length == 1:
        return None
    at = at.to(valid.device)
    if torch.equal(at - at.min(), torch.arange(length, device=at.device)[None]):
        return None
    return (at == at.min()).cumsum(-1)


def same_visibility(a: Visibility, b: Visibility) -> bool:
    """Whether two layers see the same (synchronises only where both have tensors to compare)."""
    if (a.causal, a.window, a.blocks is None) != (b.causal, b.window, b.blocks is None):
        return False
    if a.blocks is not None and b.blocks is not None and not torch.equal(a.blocks, b.blocks):
        return False
    return torch.equal(a.segments, b.segments)


def check_mask(
    view: ModelView, layer: int, visibility: Visibility, call: Call, inputs: Inputs
) -> None:
    """Compare the rebuilt visibility with the mask that the model made itself.

    Args:
        call: its mask is bool [B or 1, 1 or H, T, T], float of that shape (hidden where very negative),
            [B, T] padding, a BlockMask, or None (purely causal, nothing padded); other kinds are not
            looked at. At most ``CHECKED_ROWS`` rows, evenly spread, are compared; padding rows are not,
            nor those in blocks that the window cuts. Flash attention's tells of padding alone.

    Raises:
        RuntimeError: they differ: the loss would be of another attention than the model's.
    """
    batch, length = visibility.segments.shape
    device = visibility.segments.device
    count = min(length, CHECKED_ROWS)
    rows = torch.arange(count, device=device) * length // max(count, 1)
    valid, mask = visibility.segments >= 0, call.mask
    if call.flash and mask is None:
        wrong = ~valid
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        wrong = (mask[:, -length:].to(device) != 0) != valid
    else:
        mine = visibility.full(rows.expand(batch, count))
        if isinstance(mask, Tensor) and mask.dim() == 4:
            theirs = mask[:, 0, rows.to(mask.device)].to(device)
            if theirs.dtype != torch.bool:
                theirs = theirs > torch.finfo(theirs.dtype).min / 2
            theirs = theirs[..., :length].expand(batch, count, length)
        elif hasattr(mask, "mask_mod"):
            theirs = _block_mask_rows(mask, rows, batch, length)
        elif mask is None:
            keys = torch.arange(length, device=device)
            theirs = (keys <= rows[:, None]) if visibility.causal else torch.ones_like(mine)
            theirs = theirs.expand(batch, count, length)
        else:
            return
        wrong = (mine != theirs) & valid[:, rows, None]
        blocks = view.family.blocks(view.config, inputs, view.layer_type(layer))
        cut = _cut(view, blocks, call)
        if cut is not None:
            wrong = wrong & ~cut.to(device)[:, rows, None]
    if bool(wrong.any()):
        raise RuntimeError(
            f"{view.role} layer {layer} ({view.config.model_type}, {view.layer_type(layer)}): the "
            "visibility rebuilt from the batch differs from the model's mask in "
            f"{int(wrong.sum())} of {wrong.numel()} places; allowed: masks made of padding, causal "
            "order, sliding windows, chunks, packed sequences and the bidirectional blocks of the "
            "family"
        )


def _block_mask_rows(mask: Any, rows: Tensor, batch: int, length: int) -> Tensor:
    """[B, rows, L] of FlexAttention's mask, whose function is asked entry by entry."""
    by_key = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    by_row = torch.vmap(by_key, in_dims=(None, None, 0, None))
    by_sample = torch.vmap(by_row, in_dims=(0, None, None, None))
    head = torch.zeros((), dtype=torch.int64, device=rows.device)
    keys = torch.arange(length, device=rows.device)
    seen: Tensor = by_sample(torch.arange(batch, device=rows.device), head, rows, keys)
    return seen.expand(batch, len(rows), length)
