"""Peak extra memory of the streaming backend, measured, beside row-sliced eager."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.memory import peak_bytes
from fastalign import AlignSpec, fused_attn_align_loss

L, ROWS, COLUMNS, D = 4400, 250, 4096, 64


def inputs(heads_s: int, heads_t: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    sides = [torch.randn(1, h, L, D) for h in (heads_s, heads_s, heads_t, heads_t)]
    visual = torch.zeros(1, L, dtype=torch.bool)
    visual[:, 10 : 10 + COLUMNS] = True
    rows = torch.zeros(1, L, dtype=torch.bool)
    rows[:, -ROWS:] = True
    return sides, visual, rows


def row_sliced_eager(
    sides: list[torch.Tensor], visual: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """What a careful user writes today: attention of the needed rows only, then the cosine."""
    index = rows[0].nonzero().flatten()
    hidden = torch.arange(L) > index[:, None]

    def head_mean(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        s = q[:, :, index] @ k.transpose(-1, -2) / math.sqrt(D)
        return torch.softmax(s.masked_fill(hidden, -math.inf), -1).mean(1)[:, :, visual[0]]

    with torch.no_grad():
        t = head_mean(*sides[2:])
    s = head_mean(*sides[:2])
    return 1 - torch.cosine_similarity(s.flatten(1), t.flatten(1)).mean()


def step(kind: str, heads_s: int, heads_t: int) -> int:
    """Peak bytes beyond the inputs of one forward and backward."""
    sides, visual, rows = inputs(heads_s, heads_t)
    leaves = [x.requires_grad_() for x in sides[:2]]

    def run() -> None:
        if kind == "eager":
            loss = row_sliced_eager(sides, visual, rows)
        else:
            loss = fused_attn_align_loss(
                *sides, visual_mask=visual, query_mask=rows, spec=AlignSpec(), backend=kind
            )
        torch.autograd.grad(loss, leaves)

    return peak_bytes(run)


def test_an_eighth_of_row_sliced_eager_and_flat_in_heads() -> None:
    """At L 4,400, 16/20 heads, 250 rows, 4,096 columns: workspace beyond the gradients themselves."""
    gradients = 2 * 16 * L * D * 4
    eager, tiled = step("eager", 16, 20) - gradients, step("tiled", 16, 20) - gradients
    print(f"row-sliced eager {eager / 2**20:.0f} MiB, tiled {tiled / 2**20:.0f} MiB")
    assert tiled <= eager / 8
    doubled = step("tiled", 32, 40) - 2 * gradients
    print(f"with twice the heads {doubled / 2**20:.0f} MiB")
    assert doubled <= 1.05 * tiled


@pytest.mark.parametrize("bytes_wanted", [2**20, 2**24])
def test_the_counter_counts(bytes_wanted: int) -> None:
    """Two live buffers and one freed: the peak is two."""

    def run() -> None:
        a = torch.ones(bytes_wanted // 4)
        del a
        b = torch.ones(bytes_wanted // 4)
        c = b + 1
        del b, c

    assert abs(peak_bytes(run) - 2 * bytes_wanted) < 1000
