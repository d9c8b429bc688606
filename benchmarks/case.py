"""One shape's tensors, as every provider sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .shapes import Shape

#: One forward and backward: (loss, dq_s, dk_s); of the forward alone: (loss,).
Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Case:
    """Random tensors of a shape on a device; gradients are asked for the student's.

    Attributes:
        q_s, q_t: [B, H, R, D], the compared rows. k_s, k_t: [B, K, L, D].
        rows: [R] their positions. hidden: [R, L] bool, keys that a row does not see.
        columns: the compared columns.
    """

    shape: Shape
    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor
    rows: Tensor
    hidden: Tensor
    columns: slice

    @staticmethod
    def of(shape: Shape, device: str = "cpu") -> Case:
        """The same numbers every time and on every device."""
        rows = shape.positions()
        (h_s, h_t), (k_s, k_t) = shape.heads, shape.key_heads
        return Case(
            shape,
            shape.random(0, h_s, rows).to(device).requires_grad_(),
            shape.random(1, k_s).to(device).requires_grad_(),
            shape.random(2, h_t, rows).to(device),
            shape.random(3, k_t).to(device),
            rows.to(device),
            (torch.arange(shape.length)[None, :] > rows[:, None]).to(device),
            shape.columns,
        )

    @cached_property
    def full_q_s(self) -> Tensor:
        """[B, H, L, D]: the student's queries of the whole sequence."""
        full = self.shape.random(0, self.shape.heads[0])
        return full.to(self.q_s.device).requires_grad_()

    @cached_property
    def full_q_t(self) -> Tensor:
        """The teacher's."""
        return self.shape.random(2, self.shape.heads[1]).to(self.q_t.device)
