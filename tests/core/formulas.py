"""The recipes written a second time, straight from their papers, one sample and one row at a time.

Nothing here shares code with the package: these are the independent formulas that the definition is
tested against. Each takes q [H, L, D], k [H, L, D] of one sample per side, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, valid: Tensor, causal: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) [H, L, L] over valid (and earlier) keys."""
    length = q.shape[1]
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    allowed = valid.view(1, 1, length).expand(1, length, length).clone()
    if causal:
        allowed = allowed & torch.tril(torch.ones(length, length, dtype=torch.bool))
    scores = scores.masked_fill(~allowed, -math.inf)
    scores = torch.where(allowed.any(-1, keepdim=True), scores, 0.0)
    return torch.softmax(scores, -1) * allowed


def seen_rows(rows: Tensor, columns: Tensor, causal: bool = True) -> list[int]:
    """The rows that see at least one column."""
    return [
        i
        for i in rows.nonzero().flatten().tolist()
        if (columns[: i + 1] if causal else columns).any()
    ]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def kl_rows(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) where p > 0."""
    keep = p > 0
    return (p[keep] * (p[keep] / q[keep]).log()).sum()


def compodistill(s: Tensor, t: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """1 - cos of the flat head-mean maps; one unit."""
    a, b = s.mean(0)[rows][:, columns], t.mean(0)[rows][:, columns]
    return [1 - cos(a.flatten(), b.flatten())]


def compodistill_code(s: Tensor, t: Tensor, columns: Tensor) -> list[Tensor]:
    """The released code's steps: sink filter, mask, pool over rows, 1 - cos."""
    a, b = s.mean(0)[columns][:, columns], t.mean(0)[columns][:, columns]
    with torch.no_grad():
        keep = (a <= a.mean() + a.std()) & (b <= b.mean() + b.std())
        mask = (keep & (b != 0)).to(a.dtype)
    count = mask.sum(0).clamp(min=1)
    return [1 - cos((a * mask).sum(0) / count, (b * mask).sum(0) / count)]


def llavadi(s: Tensor, t: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    a, b = s.mean(0)[rows][:, columns], t.mean(0)[rows][:, columns]
    return [((a - b) ** 2).sum()]


def tunix(s: Tensor, t: Tensor, valid: Tensor) -> list[Tensor]:
    a, b = s.mean(0), t.mean(0)
    return [1 - cos(a[i], b[i]) for i in seen_rows(valid, valid)]


def per_head_kl(s: Tensor, t: Tensor, valid: Tensor, causal: bool) -> list[Tensor]:
    """MiniLM and LinearARD: KL(teacher || student) of every head and row."""
    rows = seen_rows(valid, valid, causal)
    return [kl_rows(t[h, i], s[h, i]) for h in range(len(s)) for i in rows]


def tinybert(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, valid: Tensor) -> list[Tensor]:
    """Squared differences of the scores; one entry a unit."""
    a = q_s @ k_s.transpose(1, 2) / math.sqrt(q_s.shape[2])
    b = q_t @ k_t.transpose(1, 2) / math.sqrt(q_t.shape[2])
    length = len(valid)
    allowed = torch.tril(torch.ones(length, length, dtype=torch.bool)) & valid & valid[:, None]
    return list(((a - b) ** 2)[:, allowed].flatten())


def renormalised_kl(s: Tensor, target: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """KLAL and LaViT: KL of a given map [rows, columns] to the renormalised head-mean map."""
    a = s.mean(0)
    out = []
    for n, i in enumerate(rows.nonzero().flatten().tolist()):
        visible = columns.clone()
        visible[i + 1 :] = False
        if not visible.any():
            continue
        given = target[n][: int(visible.sum())]
        out.append(kl_rows(given / given.sum(), a[i][visible] / a[i][visible].sum()))
    return out


def ral(
    s: Tensor, t: Tensor, rows: Tensor, valid: Tensor, weight: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(weighted Jensen-Shannon of every row, the weights)."""
    a, b = s.mean(0), t.mean(0)
    units, weights = [], []
    for i in seen_rows(rows, valid):
        m = (a[i] + b[i]) / 2
        units.append(weight[i] * (kl_rows(b[i], m) + kl_rows(a[i], m)) / 2)
        weights.append(weight[i])
    return units, weights


def align_kd(s: Tensor, t: Tensor, mix: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Squared error of every visible entry between teacher heads and mixed student heads."""
    mixed = torch.stack([sum(mix[h, g] * s[h] for h in range(len(s))) for g in range(len(t))])
    length = len(rows)
    allowed = torch.tril(torch.ones(length, length, dtype=torch.bool))
    allowed = allowed & rows[:, None] & columns[None, :]
    return list(((mixed - t) ** 2)[:, allowed].flatten())
