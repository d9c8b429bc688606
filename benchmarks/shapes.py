"""The named shapes: what is compared, row by row and token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One pair of attention layers on one batch; positions: text, image, text.

    Attributes:
        rows: "text": the last ``count`` positions; "visual": the image's own positions.
        count: how many query rows a sample has; 0: all of their kind.
    """

    name: str
    length: int
    first_visual: int
    visual: int
    heads: tuple[int, int]
    key_heads: tuple[int, int]
    size: int
    rows: str = "text"
    count: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def columns(self) -> slice:
        """The compared columns."""
        return slice(self.first_visual, self.first_visual + self.visual)

    def visual_mask(self) -> Tensor:
        """[B, L]."""
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        mask[:, self.columns] = True
        return mask

    def positions(self) -> Tensor:
        """[R] positions of the query rows, the same in every sample."""
        if self.rows == "visual":
            rows = torch.arange(self.first_visual, self.first_visual + self.visual)
            return rows[: self.count] if self.count else rows
        return torch.arange(self.length - self.count, self.length)

    def pairs(self) -> int:
        """Visible (row, key) pairs of the batch: the unit of work, causal."""
        return self.batch * int((self.positions() + 1).sum())

    def input_bytes(self) -> int:
        """Bytes of q (the compared rows) and k of both models."""
        tokens = [h * len(self.positions()) for h in self.heads]
        tokens += [h * self.length for h in self.key_heads]
        return self.batch * sum(tokens) * self.size * self.dtype.itemsize

    def describe(self) -> str:
        """In words, for tables."""
        heads = "/".join(map(str, self.heads))
        if self.key_heads != self.heads:
            heads += " (key heads " + "/".join(map(str, self.key_heads)) + ")"
        batch = f"B {self.batch}, " if self.batch > 1 else ""
        return (
            f"{batch}L {self.length:,}, {len(self.positions())} {self.rows} rows, {self.visual:,} visual "
            f"tokens, heads {heads}, d {self.size}, {str(self.dtype)[6:]}"
        )

    def random(self, seed: int, heads: int, rows: Tensor | None = None) -> Tensor:
        """[B, heads, R, D] normal numbers, R the given rows of the sequence or all of it.

        One head at a time, so that the peak of a process that makes them is about what it keeps.
        """
        count = self.length if rows is None else len(rows)
        out = torch.empty(self.batch, heads, count, self.size, dtype=self.dtype)
        for b in range(self.batch):
            for h in range(heads):
                generator = torch.Generator().manual_seed((seed * 64 + b) * 1024 + h)
                one = torch.randn(self.length, self.size, generator=generator)
                out[b, h] = one if rows is None else one[rows]
        return out


_BF16 = torch.bfloat16
#: The pair of Qwen2.5-VL 3B and 7B: heads, key heads.
_QWEN = ((16, 28), (2, 4))
_SWEPT = (256, 1024, 4096, 16384, 65536)

#: The five shapes with required factors come first; then larger ones, small ones, and a sweep over the
#: number of visual tokens at otherwise equal sizes, for the picture.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("compodistill-text", 1100, 100, 729, (16, 20), (16, 20), 128, count=200),
        Shape("compodistill-visual", 1100, 100, 729, (16, 20), (16, 20), 128, rows="visual"),
        Shape("long-d64", 4400, 50, 4096, (16, 20), (16, 20), 64, count=250),
        Shape(
            *("compodistill-text-bf16", 1100, 100, 729, (16, 20), (16, 20), 128),
            count=200,
            dtype=_BF16,
        ),
        Shape("long-gqa-bf16", 4400, 50, 4096, *_QWEN, 128, count=250, dtype=_BF16),
        Shape("llava-next", 3300, 100, 2880, (16, 32), (16, 32), 128, count=300),
        Shape("qwen2.5-vl", 16690, 50, 16384, *_QWEN, 128, count=256, dtype=_BF16),
        Shape("video", 65650, 50, 65536, *_QWEN, 128, count=64, dtype=_BF16),
        Shape("small", 300, 20, 200, (8, 8), (8, 8), 64, count=50, batch=8),
        Shape("tiny", 120, 10, 64, (4, 4), (4, 4), 64, count=20),
        *(Shape(f"sweep-{v}", v + 114, 50, v, *_QWEN, 128, count=64, dtype=_BF16) for v in _SWEPT),
    )
}

SWEEP = tuple(name for name in SHAPES if name.startswith("sweep-"))

#: Factor over the faster of row-sliced eager and its torch.compile that each must reach.
REQUIRED = {
    "compodistill-text": 1.2,
    "compodistill-visual": 2.5,
    "long-d64": 1.5,
    "compodistill-text-bf16": 1.3,
    "long-gqa-bf16": 1.8,
}
