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
    """Add the sums over the parts to the workspace's rows of ``out``.

    Every row of q looks for its place in the list: a gather, in which no two values meet, so that it is
    deterministic on every device.
    """
    entries = call.lists.rows[
        :, :2, space.start : space.end
    ].long()  # [B, 2, N]: row of q, position
    batch, count, rows = out.shape[0], entries.shape[2], out.shape[2]
    listed, order = torch.where(entries[:, 1] >= 0, entries[:, 0], rows).sort(dim=-1)
    wanted = torch.arange(rows, device=out.device).expand(batch, rows).contiguous()
    at = torch.searchsorted(listed, wanted).clamp(max=count - 1)
    shape = (batch, 1, rows, *(1,) * (out.dim() - 3))
    found = (listed.gather(1, at) == wanted).view(shape)
    place = order.gather(1, at).view(shape)
    total = partial.sum(0).gather(2, place.expand(out.shape))
    out.add_(torch.where(found, total, 0.0).to(out.dtype))
