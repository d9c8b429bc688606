"""Every way to get the loss (joint softmax, head mean, cosine) and its gradients: one function each.

A provider is made for a shape and returns (loss, dq_s, dk_s). The queries are given as each provider
likes them: the whole sequence for the ``output_attentions`` way, the compared rows for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastalign import fused_attn_align_loss

from .shapes import Shape

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape's tensors, as all providers see them."""

    shape: Shape
    q_s: Tensor  # [B, H, R, D], the compared rows
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor
    full_q_s: Tensor  # [B, H, L, D]
    full_q_t: Tensor
    rows: Tensor  # [R]
    hidden: Tensor  # [R, L] bool
    columns: slice

    @staticmethod
    def of(shape: Shape) -> Case:
        """Random tensors; gradients are asked for the student's."""
        q_s, k_s, q_t, k_t = shape.tensors()
        rows = shape.positions()
        hidden = torch.arange(shape.length)[None, :] > rows[:, None]
        columns = slice(shape.first_visual, shape.first_visual + shape.visual)
        return Case(
            shape,
            q_s[:, :, rows].clone().requires_grad_(),
            k_s.requires_grad_(),
            q_t[:, :, rows].clone(),
            k_t,
            q_s.clone().requires_grad_(),
            q_t,
            rows,
            hidden,
            columns,
        )


def _map(q: Tensor, k: Tensor, hidden: Tensor, columns: slice) -> Tensor:
    """The head-mean joint map [B, R, V] of one side, as an eager attention computes it.

    Query heads that share a key head are folded into its rows, so that keys are not repeated.
    """
    batch, heads, rows, size = q.shape
    groups = k.shape[1]
    folded = q.reshape(batch, groups, heads // groups * rows, size)
    s = (folded @ k.transpose(-1, -2)) * (1 / math.sqrt(size))
    s = s.view(batch, heads, rows, -1).masked_fill(hidden, -math.inf)
    p = torch.softmax(s, -1, dtype=torch.float32)
    return p[..., columns].mean(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (1 - torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=0)).mean()


def _gradients(loss: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = torch.autograd.grad(loss, (q, k))
    return loss.detach(), dq, dk


def _rows_loss(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, hidden: Tensor, columns: slice
) -> Tensor:
    with torch.no_grad():
        teacher = _map(q_t, k_t, hidden, columns)
    return _cosine(_map(q_s, k_s, hidden, columns), teacher)


def eager_full(case: Case) -> Step:
    """The whole matrix of every head, then sliced: what ``output_attentions`` leads to."""
    length = case.shape.length
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def whole(q: Tensor, k: Tensor) -> Tensor:
        return _map(q, k, hidden, slice(None))[:, case.rows][..., case.columns]

    def step() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            teacher = whole(case.full_q_t, case.k_t)
        loss = _cosine(whole(case.full_q_s, case.k_s), teacher)
        return _gradients(loss, case.full_q_s, case.k_s)

    return step


def eager_rows(case: Case) -> Step:
    """Eager on the compared rows alone."""

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = _rows_loss(case.q_s, case.k_s, case.q_t, case.k_t, case.hidden, case.columns)
        return _gradients(loss, case.q_s, case.k_s)

    return step


def eager_rows_upcast(case: Case) -> Step:
    """The same with 16-bit inputs widened to float32 first, where that is faster than 16-bit products."""

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = _rows_loss(
            case.q_s.float(), case.k_s.float(), case.q_t.float(), case.k_t.float(),
            case.hidden, case.columns,
        )  # fmt: skip
        return _gradients(loss, case.q_s, case.k_s)

    return step


def eager_rows_compiled(case: Case) -> Step:
    """torch.compile of ``eager_rows``."""
    return _compiled(case, upcast=False)


def eager_rows_upcast_compiled(case: Case) -> Step:
    """torch.compile of ``eager_rows_upcast``."""
    return _compiled(case, upcast=True)


def _compiled(case: Case, upcast: bool) -> Step:
    def function(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, hidden: Tensor) -> Tensor:
        if upcast:
            q_s, k_s, q_t, k_t = q_s.float(), k_s.float(), q_t.float(), k_t.float()
        return _rows_loss(q_s, k_s, q_t, k_t, hidden, case.columns)

    compiled = torch.compile(function, dynamic=False)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = compiled(case.q_s, case.k_s, case.q_t, case.k_t, case.hidden)
        return _gradients(loss, case.q_s, case.k_s)

    return step


def chunked_checkpoint(case: Case, rows: int = 64) -> Step:
    """Row chunks whose maps are recomputed in the backward; the cosine's three sums are exact."""

    def sums(q: Tensor, k: Tensor, q_t: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            t = _map(q_t, case.k_t, hidden, case.columns).flatten(1)
        s = _map(q, k, hidden, case.columns).flatten(1)
        return torch.stack([(s * t).sum(1), (s * s).sum(1), (t * t).sum(1)])

    def step() -> tuple[Tensor, Tensor, Tensor]:
        total = torch.zeros(3, case.shape.batch)
        for i in range(0, len(case.rows), rows):
            part = slice(i, i + rows)
            total = total + checkpoint(
                sums, case.q_s[:, :, part], case.k_s, case.q_t[:, :, part], case.hidden[part],
                use_reentrant=False,
            )  # fmt: skip
        st, ss, tt = total
        return _gradients((1 - st / (ss * tt).sqrt()).mean(), case.q_s, case.k_s)

    return step


def sdpa_identity(case: Case) -> Step:
    """Attention on values that are the identity on the visual columns: exact, head by head."""
    values = torch.zeros(case.shape.length, case.shape.visual, dtype=case.shape.dtype)
    values[case.columns] = torch.eye(case.shape.visual, dtype=case.shape.dtype)

    def side(q: Tensor, k: Tensor) -> Tensor:
        v = values.expand(*k.shape[:2], *values.shape)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=~case.hidden, enable_gqa=True
        )
        return out.float().mean(1)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            teacher = side(case.q_t, case.k_t)
        return _gradients(_cosine(side(case.q_s, case.k_s), teacher), case.q_s, case.k_s)

    return step


def _fastalign(case: Case, backend: str) -> Step:
    visual = case.shape.visual_mask()
    positions = case.rows.expand(case.shape.batch, -1)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = fused_attn_align_loss(
            case.q_s, case.k_s, case.q_t, case.k_t,
            visual_mask=visual, query_positions=positions, backend=backend,
        )  # fmt: skip
        return _gradients(loss, case.q_s, case.k_s)

    return step


def tiled(case: Case) -> Step:
    """fastalign's torch backend."""
    return _fastalign(case, "tiled")


def cpu(case: Case) -> Step:
    """fastalign's C++ kernels."""
    return _fastalign(case, "cpu")


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "eager_full": eager_full,
    "eager_rows": eager_rows,
    "eager_rows_compiled": eager_rows_compiled,
    "eager_rows_upcast": eager_rows_upcast,
    "eager_rows_upcast_compiled": eager_rows_upcast_compiled,
    "chunked_checkpoint": chunked_checkpoint,
    "sdpa_identity": sdpa_identity,
    "tiled": tiled,
    "cpu": cpu,
}

#: The strongest baselines: a factor is taken over the fastest of these.
PEERS = ("eager_rows", "eager_rows_compiled", "eager_rows_upcast", "eager_rows_upcast_compiled")


def estimated_bytes(provider: str, shape: Shape) -> int:
    """About what a provider holds at its peak, to leave out what does not fit."""
    heads = shape.batch * max(shape.heads)
    rows = len(shape.positions())
    if provider == "eager_full":
        return 4 * 4 * heads * shape.length**2
    if provider == "sdpa_identity":
        return 3 * 4 * heads * (rows + shape.length) * (shape.length + shape.visual)
    if provider == "chunked_checkpoint":
        return 4 * 4 * heads * min(rows, 64) * shape.length
    if provider.startswith("eager"):
        return 4 * 4 * heads * rows * shape.length
    return 0


def applies(provider: str, shape: Shape, limit: int) -> str:
    """Why a provider is left out of a shape; "" if it is not."""
    if "upcast" in provider and shape.dtype == torch.float32:
        return "inputs are float32"
    need = estimated_bytes(provider, shape)
    if need > limit:
        return f"needs about {need / 2**30:.0f} GiB"
    return ""
