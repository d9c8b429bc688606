"""Every way to get the loss (joint softmax, head mean, cosine) and its gradients: one function each.

A provider is made for a case and returns (loss, dq_s, dk_s). The queries are given as each provider
likes them: the whole sequence for the ``output_attentions`` way, the compared rows for all others.
``benchmarks.pooled`` has the same for the forward of pooled maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastalign import AlignSpec, fused_attn_align_loss

from .case import Case, Step
from .shapes import Shape

Provider = Callable[[Case], Step]


def attention_map(q: Tensor, k: Tensor, hidden: Tensor, columns: slice) -> Tensor:
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


def cosine_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the flat maps, mean over samples."""
    return (1 - torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=0)).mean()


def with_gradients(loss: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dq, dk)."""
    dq, dk = torch.autograd.grad(loss, (q, k))
    return loss.detach(), dq, dk


def _rows_loss(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, hidden: Tensor, columns: slice
) -> Tensor:
    with torch.no_grad():
        teacher = attention_map(q_t, k_t, hidden, columns)
    return cosine_loss(attention_map(q_s, k_s, hidden, columns), teacher)


def eager_full(case: Case) -> Step:
    """The whole matrix of every head, then sliced: what ``output_attentions`` leads to."""
    length = case.shape.length
    hidden = torch.ones(length, length, dtype=torch.bool, device=case.rows.device).triu(1)

    def whole(q: Tensor, k: Tensor) -> Tensor:
        return attention_map(q, k, hidden, slice(None))[:, case.rows][..., case.columns]

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = whole(case.full_q_t, case.k_t)
        loss = cosine_loss(whole(case.full_q_s, case.k_s), teacher)
        return with_gradients(loss, case.full_q_s, case.k_s)

    return step


def eager_rows(case: Case) -> Step:
    """Eager on the compared rows alone."""

    def step() -> tuple[Tensor, ...]:
        loss = _rows_loss(case.q_s, case.k_s, case.q_t, case.k_t, case.hidden, case.columns)
        return with_gradients(loss, case.q_s, case.k_s)

    return step


def eager_rows_upcast(case: Case) -> Step:
    """The same with 16-bit inputs widened to float32 first, where that is faster than 16-bit products."""

    def step() -> tuple[Tensor, ...]:
        loss = _rows_loss(
            case.q_s.float(), case.k_s.float(), case.q_t.float(), case.k_t.float(),
            case.hidden, case.columns,
        )  # fmt: skip
        return with_gradients(loss, case.q_s, case.k_s)

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

    def step() -> tuple[Tensor, ...]:
        loss = compiled(case.q_s, case.k_s, case.q_t, case.k_t, case.hidden)
        return with_gradients(loss, case.q_s, case.k_s)

    return step


def chunked_checkpoint(case: Case, rows: int = 64) -> Step:
    """Row chunks whose maps are recomputed in the backward; the cosine's three sums are exact."""

    def sums(q: Tensor, k: Tensor, q_t: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            t = attention_map(q_t, case.k_t, hidden, case.columns).flatten(1)
        s = attention_map(q, k, hidden, case.columns).flatten(1)
        return torch.stack([(s * t).sum(1), (s * s).sum(1), (t * t).sum(1)])

    def step() -> tuple[Tensor, ...]:
        total = torch.zeros(3, case.shape.batch, device=case.rows.device)
        for i in range(0, len(case.rows), rows):
            part = slice(i, i + rows)
            total = total + checkpoint(
                sums, case.q_s[:, :, part], case.k_s, case.q_t[:, :, part], case.hidden[part],
                use_reentrant=False,
            )  # fmt: skip
        st, ss, tt = total
        return with_gradients((1 - st / (ss * tt).sqrt()).mean(), case.q_s, case.k_s)

    return step


def sdpa_identity(case: Case) -> Step:
    """Attention on values that are the identity on the visual columns: exact, head by head."""
    shape, device = case.shape, case.rows.device
    values = torch.zeros(shape.length, shape.visual, dtype=shape.dtype, device=device)
    values[case.columns] = torch.eye(shape.visual, dtype=shape.dtype, device=device)

    def side(q: Tensor, k: Tensor) -> Tensor:
        v = values.expand(*k.shape[:2], *values.shape)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=~case.hidden, enable_gqa=True
        )
        return out.float().mean(1)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = side(case.q_t, case.k_t)
        return with_gradients(cosine_loss(side(case.q_s, case.k_s), teacher), case.q_s, case.k_s)

    return step


#: Columns of the identity that FlexAttention takes at once: its value's head size.
FLEX_COLUMNS = 128


def flex_side(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The head-mean map [B, R, V] by FlexAttention: values are the identity, 128 columns a call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, rows = case.shape, case.rows
    mask = create_block_mask(
        lambda b, h, i, j: j <= rows[i], None, None, len(rows), shape.length, device=rows.device
    )
    attend = torch.compile(flex_attention, dynamic=False) if rows.is_cuda else flex_attention

    def side(q: Tensor, k: Tensor) -> Tensor:
        parts = []
        for first in range(0, shape.visual, FLEX_COLUMNS):
            count = min(FLEX_COLUMNS, shape.visual - first)
            values = torch.zeros(shape.length, FLEX_COLUMNS, dtype=q.dtype, device=q.device)
            at = torch.arange(count, device=q.device)
            values[case.columns.start + first + at, at] = 1
            v = values.expand(*k.shape[:2], *values.shape)
            out = attend(q, k, v, block_mask=mask, enable_gqa=True)
            parts.append(out.float().mean(1)[..., :count])
        return torch.cat(parts, -1)

    return side


def flex_identity(case: Case) -> Step:
    """FlexAttention (on CUDA; on a CPU it has no backward) with the identity in the values' place."""
    side = flex_side(case)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = side(case.q_t, case.k_t)
        return with_gradients(cosine_loss(side(case.q_s, case.k_s), teacher), case.q_s, case.k_s)

    return step


def fastalign_loss(case: Case, backend: str, spec: AlignSpec | str) -> Callable[[], Tensor]:
    """Our own function on the case's rows."""
    visual = case.shape.visual_mask().to(case.rows.device)
    positions = case.rows.expand(case.shape.batch, -1)
    return lambda: fused_attn_align_loss(
        case.q_s, case.k_s, case.q_t, case.k_t,
        visual_mask=visual, query_positions=positions, backend=backend, spec=spec,
    )  # fmt: skip


def _fastalign(case: Case, backend: str) -> Step:
    loss = fastalign_loss(case, backend, "compodistill")
    return lambda: with_gradients(loss(), case.q_s, case.k_s)


def tiled(case: Case) -> Step:
    """fastalign's torch backend."""
    return _fastalign(case, "tiled")


def cpu(case: Case) -> Step:
    """fastalign's C++ kernels."""
    return _fastalign(case, "cpu")


def triton(case: Case) -> Step:
    """fastalign's Triton kernels."""
    return _fastalign(case, "triton")


PROVIDERS: dict[str, Provider] = {
    "eager_full": eager_full,
    "eager_rows": eager_rows,
    "eager_rows_compiled": eager_rows_compiled,
    "eager_rows_upcast": eager_rows_upcast,
    "eager_rows_upcast_compiled": eager_rows_upcast_compiled,
    "chunked_checkpoint": chunked_checkpoint,
    "sdpa_identity": sdpa_identity,
    "flex_identity": flex_identity,
    "tiled": tiled,
    "cpu": cpu,
    "triton": triton,
}

#: The strongest baselines: a factor is taken over the fastest of these.
PEERS = ("eager_rows", "eager_rows_compiled", "eager_rows_upcast", "eager_rows_upcast_compiled")
#: Ours.
OURS = ("tiled", "cpu", "triton")


def estimated_bytes(provider: str, shape: Shape) -> int:
    """About what a provider holds at its peak, to leave out what does not fit."""
    heads = shape.batch * max(shape.heads)
    rows = len(shape.positions())
    if provider == "eager_full":
        return 4 * 4 * heads * shape.length**2
    if provider == "sdpa_identity":
        return 3 * 4 * heads * (rows + shape.length) * (shape.length + shape.visual)
    if provider == "flex_identity":
        return 2 * 4 * heads * (rows * shape.visual + shape.length * FLEX_COLUMNS)
    if provider == "chunked_checkpoint":
        return 4 * 4 * heads * min(rows, 64) * shape.length
    if provider.startswith("eager"):
        return 4 * 4 * heads * rows * shape.length
    return 0


def applies(provider: str, shape: Shape, limit: int, device: str = "cpu") -> str:
    """Why a provider is left out of a shape; "" if it is not.

    Args:
        limit: bytes that a provider may take.
    """
    reason = _lacks(provider, device)
    if reason:
        return reason
    if "upcast" in provider and shape.dtype == torch.float32:
        return "inputs are float32"
    need = estimated_bytes(provider, shape)
    if need > limit:
        return f"needs about {need / 2**30:.0f} GiB"
    return ""


def _lacks(provider: str, device: str) -> str:
    """What of the machine a provider misses."""
    if provider == "cpu" and device != "cpu":
        return "runs on CPUs"
    if provider == "flex_identity" and device == "cpu":
        return "FlexAttention has no backward on CPUs"
    if provider == "triton":
        from fastalign.backends.triton import INSTALLED, interpreting  # type: ignore[attr-defined]

        if not INSTALLED:
            return "the package triton is not installed"
        if device == "cpu" and not interpreting():
            return "runs on GPUs (and in Triton's interpreter)"
    return ""
