"""One validated call: the tensors, descriptors and scalars that every backend receives.

``api.py`` builds a ``Problem`` once; the reference and each backend read it and nothing else. The
order of the fields is the order of the operators' arguments (``ops.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .select import Visibility
from .spec import AlignSpec


@dataclass(frozen=True)
class Problem:
    """One alignment of one pair of layers.

    Shapes: B samples, L keys, R query rows (L, or fewer when the caller sliced them), H heads and K
    key heads (K divides H; sides may differ), D head size (sides may differ), G groups.

    Attributes:
        q_s, k_s: student, [B, H_s, R, D_s] and [B, K_s, L, D_s], after rotary embedding, any strides.
        q_t, k_t: teacher, likewise with its own H, K, D; None when ``target`` is given.
        target: a given teacher map instead: [B, G, N, C] (``map``, ``row``), row n the n-th selected
            row of the sample and column c its c-th compared column, or [B, G, C] (``pooled``); with
            ``target_index``, the last axis holds the entries that ``target_index`` names.
        target_index: int64, shape of ``target``: the column ordinal of each entry, -1 for none.
        mix: [H_s, H_t], heads="mix" only.
        lse_s, lse_t: [B, H, R] natural log-sum-exp of each row over its visible keys, or None.
        positions: [B, R] int64, sequence position of each query row; -1: not a compared row.
        columns: [B, L] bool, the compared columns (valid ones only).
        row_weight: [B, R] or None (all ones).
        segments, blocks, causal, window: see ``select.Visibility``.
        sink_s, sink_t: [H] or None: a logit in the denominator of every row of the head.
        scale_s, scale_t: factor of q k^T. softcap_s, softcap_t: cap * tanh(score / cap); 0: none.
        spec: the objective.
    """

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    target: Tensor | None
    target_index: Tensor | None
    mix: Tensor | None
    lse_s: Tensor | None
    lse_t: Tensor | None
    positions: Tensor
    columns: Tensor
    row_weight: Tensor | None
    segments: Tensor
    blocks: Tensor | None
    sink_s: Tensor | None
    sink_t: Tensor | None
    causal: bool
    window: int
    scale_s: float
    scale_t: float
    softcap_s: float
    softcap_t: float
    spec: AlignSpec

    @cached_property
    def visibility(self) -> Visibility:
        """Who sees whom."""
        return Visibility(self.segments, self.blocks, self.causal, self.window)

    @property
    def groups(self) -> int:
        """G: the number of compared maps per sample."""
        if self.spec.heads == "mean":
            return 1
        if self.spec.heads == "each":
            return self.q_s.shape[1]
        assert self.mix is not None
        return self.mix.shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the arithmetic runs in: float64 if any q or k is, else float32."""
        tensors = (self.q_s, self.k_s, self.q_t, self.k_t)
        wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
        return torch.float64 if wide else torch.float32

    def student(self) -> Side:
        """The student's half."""
        return Side(
            self.q_s, self.k_s, self.lse_s, self.sink_s, self.scale_s, self.softcap_s, self.spec
        )

    def teacher(self) -> Side:
        """The teacher's half (only when no target is given)."""
        assert self.q_t is not None and self.k_t is not None
        return Side(
            self.q_t, self.k_t, self.lse_t, self.sink_t, self.scale_t, self.softcap_t, self.spec
        )


@dataclass(frozen=True)
class Side:
    """One model's half of a problem, so that both run through the same code."""

    q: Tensor
    k: Tensor
    lse: Tensor | None
    sink: Tensor | None
    scale: float
    softcap: float
    spec: AlignSpec

    @property
    def heads(self) -> int:
        """H of this side."""
        return self.q.shape[1]

    @property
    def repeat(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]
