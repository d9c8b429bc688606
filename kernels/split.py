"""Few rows: a row block's sweep over keys is cut into parts, which are added up in their order.

A kernel that can be cut takes SPLIT and ``parts``: program i_block of the first axis is part
i_block % parts of row block i_block // parts. Each part writes its own sums, by place in the list of rows
and not by row of q, so that they take no more memory than the rows that are compared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call
from .map_gradient import Workspace


@triton.jit
def block_and_part(parts, SPLIT: tl.constexpr):
    """(row block, part) of this program; without SPLIT the first axis is row blocks alone."""
    i_block = tl.program_id(0)
    i_part = 0
    if SPLIT:
        i_part = i_block % parts
        i_block = i_block // parts
    return i_block, i_part


def empty_parts(parts: int, space: Workspace, out: Tensor) -> Tensor:
    """fp32 zeros [parts, B, H, rows of the workspace, ...] for an out [B, H, R, ...]."""
    shape = (parts, *out.shape[:2], space.end - space.start, *out.shape[3:])
    return torch.zeros(shape, dtype=torch.float32, device=out.device)


def add_up(partial: Tensor, call: Call, space: Workspace, out: Tensor) -> None:
    """Put the sums over the parts into ``out``, which is zero at the workspace's rows.

    Places that hold no row carry 0 and point to row 0, so that the order of this scatter is of no effect.
    """
    index = call.lists.rows[:, 0, space.start : space.end].long()  # [B, N]
    index = index.view(index.shape[0], 1, -1, *(1,) * (out.dim() - 3))
    total = partial.sum(0).to(out.dtype)
    out.scatter_add_(2, index.expand(total.shape), total)
