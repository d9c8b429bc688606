"""Masks as index lists: the int32 descriptors that kernels read instead of an L x L mask.

Built by a handful of torch operators on any device, in O(B (R + L) log(R + L)) and without waiting for
the device (unless the caller asks for exact counts). Slots: ``primitives``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import GRAIN

#: First of the two slots of a row that hold its range in a list of keys.
EVERY, COMPARED, OTHERS = 4, 6, 8


@dataclass(frozen=True)
class KeyList:
    """Keys of every sample, in order of position.

    Attributes:
        entries: [B, 5, length] int32, see ``primitives``.
        count: no sample has more keys than this.
        slot: where a row keeps its range in this list.
        dense: entry i is position i.
        last: the last position there is.
    """

    entries: Tensor
    count: int
    slot: int
    dense: bool
    last: int

    @property
    def length(self) -> int:
        """The padded length."""
        return self.entries.shape[2]


@dataclass(frozen=True)
class Lists:
    """Rows by position, and three lists of keys: every valid one, the compared columns, the others.

    Attributes:
        rows: [B, 11, row_length] int32. row_count: no sample has more rows than this.
        interval: each row sees exactly its range of every list (and each key is seen by exactly its
            range of rows), so that no other descriptor need be compared.
    """

    rows: Tensor
    row_count: int
    every: KeyList
    compared: KeyList
    others: KeyList
    interval: bool

    @property
    def row_length(self) -> int:
        """The padded length of the row list."""
        return self.rows.shape[2]


def build_lists(
    positions: Tensor,
    columns: Tensor,
    segments: Tensor,
    blocks: Tensor | None,
    causal: bool,
    window: int,
    exact: bool,
) -> Lists:
    """The lists of a batch.

    Args:
        positions: [B, R] int64, -1: not compared. columns: [B, L] bool. segments: [B, L] int32, -1:
            padding. blocks: [B, L] int32 or None. causal, window: as ``select.Visibility``.
        exact: count rows and columns and look whether visibility is a matter of intervals (one
            synchronisation); else R and L stand for the counts and every descriptor is compared.
    """
    batch, length = columns.shape
    row_count, column_count, other_count = positions.shape[1], length, length
    valid = segments >= 0
    if blocks is not None:  # padding is in no block: it would stretch the range of the block's rows
        blocks = torch.where(valid, blocks, -1)
    interval, dense = False, False
    if exact and batch:
        counts = [(positions >= 0).sum(-1), columns.sum(-1), (valid & ~columns).sum(-1)]
        scattered, padded = _scattered(segments, blocks, valid), (~valid).sum(-1)
        facts = torch.stack([*counts, scattered, padded]).amax(-1).tolist()
        row_count, column_count, other_count = facts[:3]
        interval, dense = facts[3] == 0, facts[4] == 0

    # the stable sort puts rows that are not compared (position "length") behind the others
    by_position, order = torch.where(positions >= 0, positions, length).sort(dim=-1, stable=True)
    used = by_position < length
    token = by_position.clamp(max=max(length - 1, 0))
    lo, hi = _key_range(by_position, token, segments, blocks, causal, window)
    lo, hi = torch.where(used, lo, length), torch.where(used, hi, 0)
    ordinal = ((positions >= 0).cumsum(-1) - 1).gather(1, order)
    every = _key_list(valid, segments, blocks, lo, hi)
    compared = _key_list(columns, segments, blocks, lo, hi)
    others = _key_list(valid & ~columns, segments, blocks, lo, hi)

    def of_token(ids: Tensor | None, absent: int) -> Tensor:
        if ids is None:
            return torch.full_like(token, absent)
        return torch.where(used, ids.gather(1, token).long(), absent)

    slots = [
        torch.where(used, order, 0),
        torch.where(used, by_position, -1),
        of_token(segments, -2),
        of_token(blocks, -1),
        *(every[1], every[2]),
        *(compared[1], compared[2]),
        *(others[1], others[2]),
        torch.where(used, ordinal, 0),
    ]
    fill = [0, -1, -2, -1, length, 0, length, 0, length, 0, 0]
    return Lists(
        rows=_stack(slots, fill),
        row_count=row_count,
        every=KeyList(every[0], length, EVERY, dense, length - 1),
        compared=KeyList(compared[0], column_count, COMPARED, False, length - 1),
        others=KeyList(others[0], other_count, OTHERS, False, length - 1),
        interval=interval,
    )


def _scattered(segments: Tensor, blocks: Tensor | None, valid: Tensor) -> Tensor:
    """[B]: how many segments and blocks are interrupted by a valid token of another one.

    Where none is, a row's causal or windowed range and its block both hold the row and are runs of the
    list of valid keys, and so is their union; and both bounds grow with the row's position.
    """
    order = torch.argsort((~valid).to(torch.int8), dim=-1, stable=True)  # valid tokens first
    total = torch.zeros_like(valid[:, 0], dtype=torch.int64)
    for ids in (segments,) if blocks is None else (segments, blocks):
        token = ids.gather(1, order)
        starts = torch.ones_like(token, dtype=torch.bool)
        starts[:, 1:] = token[:, 1:] != token[:, :-1]
        by_id = token.sort(dim=-1).values
        kinds = torch.ones_like(starts)
        kinds[:, 1:] = by_id[:, 1:] != by_id[:, :-1]
        # runs minus kinds; tokens of no segment or block (-1) may lie anywhere
        runs = (starts & (token >= 0)).sum(-1)
        total = total + runs - (kinds & (by_id >= 0)).sum(-1)
    return total


def _key_range(
    rows: Tensor, token: Tensor, segments: Tensor, blocks: Tensor | None, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Bounds [lo, hi) of the positions that each row can see (as ``Visibility.key_range``, batched)."""
    length = segments.shape[1]
    lo = (rows - window + 1).clamp(min=0) if window else torch.zeros_like(rows)
    if causal:
        hi = rows + 1
    else:
        hi = (rows + window).clamp(max=length) if window else torch.full_like(rows, length)
    if blocks is not None:
        first, last = _span(blocks, token)
        member = blocks.gather(1, token) >= 0
        lo = torch.where(member, torch.minimum(lo, first), lo)
        hi = torch.where(member, torch.maximum(hi, last + 1), hi)
    first, last = _span(segments, token)
    return torch.maximum(lo, first), torch.minimum(hi, last + 1)


def _span(ids: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """[B, R]: the first and the last position that carries the id of each row's token."""
    by_id, order = ids.sort(dim=-1, stable=True)
    wanted = ids.gather(1, token)
    first = torch.searchsorted(by_id, wanted)
    last = torch.searchsorted(by_id, wanted, right=True) - 1
    return order.gather(1, first), order.gather(1, last)


def _key_list(
    chosen: Tensor, segments: Tensor, blocks: Tensor | None, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(descriptors of the chosen keys, first and last entry in reach of each row)."""
    length = chosen.shape[1]
    before = torch.nn.functional.pad(chosen.cumsum(-1), (1, 0))
    order = torch.argsort(
        (~chosen).to(torch.int8), dim=-1, stable=True
    )  # chosen keys first, by position
    place = torch.arange(length, device=chosen.device)
    used = place < before[:, -1:]
    position = torch.where(used, order, 0)
    segment = torch.where(used, segments.gather(1, order).long(), -1)
    block = torch.full_like(order, -1) if blocks is None else blocks.gather(1, order).long()
    # rows are sorted by position: those that can see key j lie between the first whose running
    # maximum of hi is beyond j and the last whose running minimum of lo (from behind) is not
    reach = hi.cummax(-1).values.contiguous()
    start = lo.flip(-1).cummin(-1).values.flip(-1).contiguous()
    first = torch.searchsorted(reach, position, right=True)
    last = torch.searchsorted(start, position, right=True)
    slots = [position, segment, block, torch.where(used, first, lo.shape[1])]
    entries = _stack([*slots, torch.where(used, last, 0)], [0, -1, -1, lo.shape[1], 0])
    return entries, before.gather(1, lo), before.gather(1, hi)


def _stack(slots: list[Tensor], fill: list[int]) -> Tensor:
    """[B, slots, padded length] int32."""
    entries = torch.stack(slots, 1).to(torch.int32)
    padded = -(-max(entries.shape[2], 1) // GRAIN) * GRAIN
    out = torch.tensor(fill, dtype=torch.int32, device=entries.device)
    out = out.view(1, -1, 1).repeat(entries.shape[0], 1, padded)
    out[:, :, : entries.shape[2]] = entries
    return out
