"""Which rows, which columns, who sees whom: everything that masks say, as O(L) descriptors.

Visibility is never held as an L x L mask. ``visible`` answers for any block of rows and keys;
``Visibility`` carries the per-token descriptors it needs; ``select_sample`` turns the masks of one
sample into index lists and, for each row, the range of keys that can be visible at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Who may see whom, in O(L).

    Attributes:
        segments: [B, L] int32. A key is visible only to rows of its segment; -1: not valid (padding).
        blocks: [B, L] int32 or None. Tokens with the same block >= 0 see each other whatever the
            causal order and the window say (bidirectional image blocks, prefixes); -1: in no block.
        causal: whether keys after the row are hidden.
        window: keys at a distance of ``window`` or more are hidden; 0: no window.
    """

    segments: Tensor
    blocks: Tensor | None
    causal: bool
    window: int

    def sample(self, b: int) -> Visibility:
        """The descriptors of one sample, without the batch dimension."""
        blocks = None if self.blocks is None else self.blocks[b]
        return Visibility(self.segments[b], blocks, self.causal, self.window)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Whether row position i sees key position j.

        Args:
            rows: [..., I] int64 positions of query rows; -1 (no row) sees nothing.
            keys: [..., J] int64 positions of keys; leading dimensions as ``rows``.

        Returns:
            [..., I, J] bool. ``segments`` and ``blocks`` must have the leading dimensions of ``rows``.
        """
        i, j = rows.unsqueeze(-1), keys.unsqueeze(-2)
        near = torch.ones_like(i - j, dtype=torch.bool)
        if self.causal:
            near = near & (j <= i)
        if self.window:
            near = near & ((i - j).abs() < self.window)
        row_token = rows.clamp(min=0)
        if self.blocks is not None:
            row_block = self.blocks.gather(-1, row_token).unsqueeze(-1)
            key_block = self.blocks.gather(-1, keys).unsqueeze(-2)
            near = near | ((row_block == key_block) & (row_block >= 0))
        row_segment = self.segments.gather(-1, row_token).unsqueeze(-1)
        key_segment = self.segments.gather(-1, keys).unsqueeze(-2)
        return near & (row_segment == key_segment) & (key_segment >= 0) & (i >= 0)

    def full(self, positions: Tensor) -> Tensor:
        """[B, R, L] bool for ``positions`` [B, R]: the materialised mask, for the reference only."""
        length = self.segments.shape[-1]
        keys = torch.arange(length, device=positions.device).expand(positions.shape[0], length)
        return self.visible(positions, keys)

    def key_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For rows [I] of one sample: lowest visible key and one past the highest, as bounds.

        Every visible key of row i lies in [lo_i, hi_i); keys inside may still be hidden. This is
        what lets a tile above the causal diagonal, outside a window or in another packed segment be
        skipped without looking at it.
        """
        length = self.segments.shape[-1]
        zero, end = torch.zeros_like(rows), torch.full_like(rows, length)
        lo = (rows - self.window + 1).clamp(min=0) if self.window else zero
        if self.causal:
            hi = rows + 1
        else:
            hi = (rows + self.window).clamp(max=length) if self.window else end
        token = rows.clamp(min=0)
        if self.blocks is not None:
            first, last = _span(self.blocks)
            member = self.blocks[token] >= 0
            lo = torch.where(member, torch.minimum(lo, first[token]), lo)
            hi = torch.where(member, torch.maximum(hi, last[token] + 1), hi)
        first, last = _span(self.segments)
        return torch.maximum(lo, first[token]), torch.minimum(hi, last[token] + 1)


def _span(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For ids [L]: for each token, the first and the last position that carries its id."""
    length = ids.shape[0]
    place = torch.arange(length, device=ids.device)
    _, group = torch.unique(ids, return_inverse=True)
    first = torch.full((length + 1,), length, device=ids.device).scatter_reduce(
        0, group, place, "amin"
    )
    last = torch.full((length + 1,), -1, device=ids.device).scatter_reduce(0, group, place, "amax")
    return first[group], last[group]


@dataclass(frozen=True)
class Sample:
    """The selection of one sample, as index lists.

    Attributes:
        rows: [I] int64 indices into the query rows of q, ordered by position.
        positions: [I] int64 sequence position of each of them.
        ordinals: [I] int64 place of each among the selected rows as they were given.
        columns: [C] int64 positions of the compared columns, ascending.
        lo, hi: [I] int64 the key range of each row (``Visibility.key_range``).
    """

    rows: Tensor
    positions: Tensor
    ordinals: Tensor
    columns: Tensor
    lo: Tensor
    hi: Tensor


def select_sample(positions: Tensor, columns: Tensor, visibility: Visibility) -> Sample:
    """Index lists of one sample.

    Args:
        positions: [R] int64, the sequence position of each query row of q, -1 where it is not used.
        columns: [L] bool, the compared columns (valid ones only).
        visibility: the sample's descriptors (no batch dimension).
    """
    rows = (positions >= 0).nonzero().flatten()
    order = torch.argsort(positions[rows], stable=True)
    chosen = positions[rows][order]
    lo, hi = visibility.key_range(chosen)
    return Sample(rows[order], chosen, order, columns.nonzero().flatten(), lo, hi)
