"""One attention call: what the loss must know of it, read from what the module passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lse import dense


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        query: [B, H, T, D], key: [B, K, T, D], any strides; keys are not repeated.
        mask: what the model's mask function made: bool or float [B or 1, 1, T, T], a BlockMask, [B, T]
            or None.
        scaling, softcap, window, causal: as the module passes them (None: not passed).
        sinks: [H] or None.
        flash: whether the mask follows flash attention: padding [B, T] or nothing, so that blocks and
            chunks do not exist, and packed sequences are told by ``positions`` and ``starts``.
        positions, starts: for flash attention the position_ids and cu_seq_lens_q that it receives.
        lse: [B, H, T] float32, the log-sum-exp of each row's scores, sinks not included, where the
            attention returned it.
        grad: whether gradients were enabled where the masks were made, outside any checkpoint.
        borrowed: whether the memory of query and key is used for something else after the call (in
            compiled code): what is kept of them must be copied.
    """

    query: Tensor
    key: Tensor
    mask: Any
    scaling: float | None
    softcap: float | None
    window: int | None
    causal: bool
    sinks: Tensor | None
    flash: bool
    positions: Tensor | None
    starts: Tensor | None
    lse: Tensor | None
    grad: bool
    borrowed: bool = False


#: What a module passes to its attention, apart from q, k, v and the mask.
Passed = Mapping[str, Any]


def is_causal(module: Any, passed: Passed) -> bool:
    """Whether the attention hides later keys where no mask says so."""
    causal = passed.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def sequence_starts(passed: Passed) -> Tensor | None:
    """The boundaries of packed sequences, if flash attention is given all that it needs to use them."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    if any(passed.get(name) is None for name in names):
        return None
    starts: Tensor = passed["cu_seq_lens_q"]
    return starts


def usable_lse(query: Tensor, found: Tensor | None) -> Tensor | None:
    """[B, H, T]: the log-sum-exp that the attention beneath returned or kept, of full precision.

    transformers returns FlexAttention's in the type of the values: after a rounding to bfloat16 it is
    wrong by percents of every probability, and our own is taken instead.
    """
    if found is None or found.dtype in (torch.float16, torch.bfloat16):
        return None
    return dense(found, query)
