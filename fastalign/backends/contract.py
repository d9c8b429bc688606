"""What a backend returns: the loss, what its backward needs, and the gradients.

Every shape follows from the shapes of the inputs alone, never from what a mask holds, so that the
operators' fake kernels can tell it (``ops.py``) and nothing of size rows x columns is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem


class Forward(NamedTuple):
    """The loss and O(rows x heads) statistics.

    Attributes:
        loss: scalar, ``problem.dtype``.
        lse_s, lse_t: [B, H, R] log-sum-exp of every compared row over the keys of its softmax, sinks
            included (0 where unused; lse_t is [B, 0, R] with a given target).
        statistics: [n, B, G, R] ``maths.row_statistics`` of every row (pooled: [n, B, G, 1]).
        entries: [B, R] compared columns that each row sees.
        pooled: [5, B, G, L] by compared column, pooled only (else 5, B, G, 0): A_s, A_t, log A_s,
            log A_t, and the sum of the weights of the rows that keep the column.
        thresholds: [2, B, G] of the sink filter, student and teacher ([2, B, 0] without one).
    """

    loss: Tensor
    lse_s: Tensor
    lse_t: Tensor
    statistics: Tensor
    entries: Tensor
    pooled: Tensor
    thresholds: Tensor


class Gradients(NamedTuple):
    """d loss / d student, like the inputs; an empty tensor for mix or sink_s where there is none."""

    q_s: Tensor
    k_s: Tensor
    mix: Tensor
    sink_s: Tensor

    def like(self, problem: Problem) -> Gradients:
        """The same in the types of what they are gradients of."""
        leaves = (getattr(problem, name) for name in self._fields)
        return Gradients(*(
            x if leaf is None else x.to(leaf.dtype) for x, leaf in zip(self, leaves, strict=True)
        ))  # fmt: skip


def empty_forward(problem: Problem) -> Forward:
    """Zero tensors of the right shapes: what a backend fills, and what a fake kernel returns."""
    spec, groups = problem.spec, problem.groups
    batch, heads, rows = problem.q_s.shape[:3]
    heads_t = 0 if problem.q_t is None else problem.q_t.shape[1]
    length = problem.columns.shape[1]
    pooled = spec.compare == "pooled"

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=problem.dtype, device=problem.q_s.device)

    return Forward(
        loss=zeros(),
        lse_s=zeros(batch, heads, rows),
        lse_t=zeros(batch, heads_t, rows),
        statistics=zeros(
            3 if spec.divergence == "cosine" else 1, batch, groups, 1 if pooled else rows
        ),
        entries=zeros(batch, rows),
        pooled=zeros(5, batch, groups, length if pooled else 0),
        thresholds=zeros(2, batch, groups if spec.sink_sigma is not None else 0),
    )
