"""From a kernel's own log-sum-exp to [B, H, R] float32.

Every kernel named here gives natural logarithms of the sum over visible keys of exp(score), the score
scaled and capped; they differ in layout, in what stands in rows that see no key, and in sinks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: aten's efficient attention rounds the rows up to a multiple of this.
ROW_GRAIN = 32
_ASK = (
    "ask the kernel for it: return_attn_probs=True (flash_attn 2, 3), return_lse=True (flash_attn 4), "
    "return_aux=AuxRequest(lse=True) (FlexAttention), compute_log_sumexp=True (efficient attention)"
)


def dense(lse: Tensor | None, query: Tensor) -> Tensor:
    """The log-sum-exp of a kernel that keeps the batch apart: flash_attn, FlexAttention, aten.

    Args:
        lse: float32 or float64, any strides; [B, H, R]; [B, H, R'], R' = R rounded up to a multiple of 32
            (efficient attention, where the rest holds no row); or [B, H, R, 1] (cuDNN).
        query: [B, H, R, D], whose shape is compared. flash_attn has it as [B, R, H, D]: transpose it.

    Returns:
        [B, H, R] in ``lse``'s type, natural logarithms; -inf where the kernel wrote +inf (flash_attn 2
        does so for rows that see no key).

    Raises:
        ValueError: no log-sum-exp, an empty one, or one of another shape. TypeError: not a tensor, or of
            half precision: rounded to bfloat16, it is wrong by percents of every probability.
    """
    lse = _checked(lse)
    batch, heads, rows = query.shape[:3]
    padded = -(-rows // ROW_GRAIN) * ROW_GRAIN
    if lse.dim() == 4 and lse.shape[3] == 1:
        lse = lse.squeeze(3)
    if lse.dim() != 3 or lse.shape[:2] != (batch, heads) or lse.shape[2] not in (rows, padded):
        raise ValueError(
            f"lse has shape {list(lse.shape)}; allowed for a query of shape {list(query.shape)}: "
            f"{[batch, heads, rows]}, its rows rounded up to {padded}, or {[batch, heads, rows, 1]} "
            "(a packed one, [H, total], goes through fastalign.lse.packed)"
        )
    return _no_row(lse[:, :, :rows])


def packed(lse: Tensor | None, attention_mask: Tensor) -> Tensor:
    """The log-sum-exp of a varlen kernel, put back where its tokens lie in the padded batch.

    Args:
        lse: [H, total] float32 or float64, natural logarithms, the tokens of all samples after one another
            (flash_attn_varlen_func of flash_attn 2.6 and later, of 3 and 4).
        attention_mask: [B, L] bool, True for the ``total`` tokens. For samples that were packed into one
            row of the batch: all True, [1, total].

    Returns:
        [B, H, L] in ``lse``'s type; -inf at padding and in rows that see no key.

    Raises:
        ValueError: as ``dense``; a mask with another number of tokens. TypeError: as ``dense``.
    """
    lse = _checked(lse)
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool:
        came = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise TypeError(f"attention_mask is {came}; allowed: a bool tensor [B, L]")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; allowed: two dimensions [B, L]"
        )
    total = int(attention_mask.sum())
    if lse.dim() != 2 or lse.shape[1] != total:
        raise ValueError(
            f"lse has shape {list(lse.shape)}; allowed: [H, {total}], the number of True entries of "
            "attention_mask (one that keeps the batch apart goes through fastalign.lse.dense)"
        )
    batch, length = attention_mask.shape
    out = lse.new_full((batch, length, lse.shape[0]), -math.inf)
    out[attention_mask] = lse.T
    return _no_row(out.transpose(1, 2))


def add_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """``lse`` with the heads' sink logits in it, as a call with ``sink_s`` or ``sink_t`` needs it.

    flash_attn 4 with ``learnable_sink`` has them in already; the other kernels know no sinks.

    Args:
        lse: [B, H, R]. sink: [H] logits (natural, not scaled).

    Raises:
        ValueError: shapes that do not go together.
    """
    if lse.dim() != 3 or sink.shape != lse.shape[1:2]:
        raise ValueError(
            f"sink has shape {list(sink.shape)} and lse {list(lse.shape)}; allowed: [H] and [B, H, R]"
        )
    return torch.logaddexp(lse, sink.to(lse)[None, :, None])


def _checked(lse: Any) -> Tensor:
    if lse is None:
        raise ValueError(f"lse is None; allowed: a tensor ({_ASK})")
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse is {type(lse).__name__}; allowed: a tensor")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"lse is {lse.dtype}; allowed: float32 or float64, as the kernels compute it (rounded to "
            "half precision it is wrong by percents of every probability)"
        )
    if lse.dim() and not lse.shape[-1]:
        raise ValueError(
            f"lse is empty, shape {list(lse.shape)}; allowed: one entry a row ({_ASK})"
        )
    return lse.detach()


def _no_row(lse: Tensor) -> Tensor:
    """+inf, which some kernels write for a row without keys, is no sum of exponentials."""
    return lse.masked_fill(lse == math.inf, -math.inf)
