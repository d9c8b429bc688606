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

    def visual_mask(self) -> Tensor:
        """[B, L]."""
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        mask[:, self.first_visual : self.first_visual + self.visual] = True
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

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_s, k_s, q_t, k_t of the whole sequence, [B, heads, L, D]."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int) -> Tensor:
            shape = (self.batch, heads, self.length, self.size)
            return torch.randn(shape, generator=generator).to(self.dtype)

        (h_s, h_t), (k_s, k_t) = self.heads, self.key_heads
        return normal(h_s), normal(k_s), normal(h_t), normal(k_t)


_BF16 = torch.bfloat16

#: The five shapes with required factors come first; then the larger ones and the small ones.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("compodistill-text", 1100, 100, 729, (16, 20), (16, 20), 128, count=200),
        Shape("compodistill-visual", 1100, 100, 729, (16, 20), (16, 20), 128, rows="visual"),
        Shape("long-d64", 4400, 50, 4096, (16, 20), (16, 20), 64, count=250),
        Shape(
            "compodistill-text-bf16",
            1100,
            100,
            729,
            (16, 20),
            (16, 20),
            128,
            count=200,
            dtype=_BF16,
        ),
        Shape("long-gqa-bf16", 4400, 50, 4096, (16, 28), (2, 4), 128, count=250, dtype=_BF16),
        Shape("llava-next", 3300, 100, 2880, (16, 32), (16, 32), 128, count=300),
        Shape("qwen2.5-vl", 16640, 50, 16384, (16, 28), (2, 4), 128, count=200, dtype=_BF16),
        Shape("video", 65800, 50, 65536, (16, 28), (2, 4), 128, count=64, dtype=_BF16),
        Shape("small", 300, 20, 200, (8, 8), (8, 8), 64, count=50, batch=8),
        Shape("tiny", 120, 10, 64, (4, 4), (4, 4), 64, count=20),
    )
}

#: Factor over the faster of row-sliced eager and its torch.compile that each must reach (issue 3).
REQUIRED = {
    "compodistill-text": 1.2,
    "compodistill-visual": 2.5,
    "long-d64": 1.5,
    "compodistill-text-bf16": 1.3,
    "long-gqa-bf16": 1.8,
}
