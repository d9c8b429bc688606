"""One layer's q and k with what their softmax needs; its maps; a loss formed in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..maths import group_map
from ..problem import Side
from ..select import Visibility
from ..spec import AlignSpec

#: Bytes of the heads x rows x keys tile that a materialised map is computed through.
TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LayerState:
    """What is kept of one attention call.

    Attributes:
        q: [B, H, R, D] the chosen query rows. k: [B, K, L, D] every key.
        scale, softcap: of the scores; softcap None: none. sinks: [H] or None.
        visibility: who sees whom.
        lse: [B, H, R] the log-sum-exp of each row's softmax, if the model's attention returned it.
    """

    q: Tensor
    k: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    visibility: Visibility
    lse: Tensor | None = None

    def detach(self) -> LayerState:
        """Without gradients."""
        sinks = None if self.sinks is None else self.sinks.detach()
        return replace(self, q=self.q.detach(), k=self.k.detach(), sinks=sinks)

    def copy(self) -> LayerState:
        """With memory of its own."""
        lse = None if self.lse is None else self.lse.clone()
        return replace(self, q=self.q.clone(), k=self.k.clone(), lse=lse)

    def to(self, device: torch.device) -> LayerState:
        """On another device."""
        if self.q.device == device:
            return self
        v = self.visibility
        blocks = None if v.blocks is None else v.blocks.to(device)
        return replace(
            self,
            q=self.q.to(device),
            k=self.k.to(device),
            sinks=None if self.sinks is None else self.sinks.to(device),
            lse=None if self.lse is None else self.lse.to(device),
            visibility=replace(v, segments=v.segments.to(device), blocks=blocks),
        )


def concatenate(states: Sequence[LayerState]) -> LayerState:
    """The layers of a window as one layer with all their heads; their scalars must agree."""
    if len(states) == 1:
        return states[0]
    sinks, lses = [state.sinks for state in states], [state.lse for state in states]
    return replace(
        states[0],
        q=torch.cat([state.q for state in states], dim=1),
        k=torch.cat([state.k for state in states], dim=1),
        sinks=None if sinks[0] is None else torch.cat([x for x in sinks if x is not None]),
        lse=None if None in lses else torch.cat([x for x in lses if x is not None], dim=1),
    )


def concatenable(states: Sequence[LayerState]) -> bool:
    """Whether ``concatenate`` means the mean of the layers' maps: same shapes and scalars.

    Visibility is compared by the caller, who needs the answer for the student's layer too.
    """
    first = states[0]
    return all(
        (x.q.shape, x.k.shape, x.scale, x.softcap, x.sinks is None)
        == (first.q.shape, first.k.shape, first.scale, first.softcap, first.sinks is None)
        for x in states
    )


def materialise(state: LayerState, positions: Tensor, columns: Tensor, spec: AlignSpec) -> Tensor:
    """The map of one layer, without gradient: [B, G, R, C].

    A tile of rows at a time, so that heads x rows x keys never exists as a whole.

    Args:
        state: q holds the rows of ``positions`` [B, R] (-1: row of zeros).
        columns: [B, L] bool; C is the most of a sample, columns in order, zeros after the last.
        spec: heads and normalize are read. ``"visual"`` gives the joint map (renormalise it after
            averaging layers).
    """
    batch, heads, rows = state.q.shape[:3]
    width = int(columns.sum(-1).max()) if columns.numel() else 0
    groups = 1 if spec.heads == "mean" else heads
    out = torch.zeros(batch, groups, rows, width, dtype=working_dtype(state), device=state.q.device)
    for b, part, maps in _tiles(state, positions, columns, spec):
        out[b, :, part, : maps.shape[-1]] = maps
    return out


def row_masses(state: LayerState, positions: Tensor, columns: Tensor) -> Tensor:
    """[B, R] the attention of each row to ``columns``, mean over heads, without gradient."""
    shape = (state.q.shape[0], state.q.shape[2])
    out = torch.zeros(shape, dtype=working_dtype(state), device=state.q.device)
    for b, part, maps in _tiles(state, positions, columns, AlignSpec()):
        out[b, part] = maps[0].sum(-1)
    return out


def pool_rows(maps: Tensor, state: LayerState, positions: Tensor, columns: Tensor) -> Tensor:
    """[B, G, C]: maps [B, G, R, C] averaged over the rows that see each column (0 if none does)."""
    out = maps.new_zeros(maps.shape[0], maps.shape[1], maps.shape[3])
    for b in range(len(maps)):
        at = columns[b].nonzero().flatten()
        seen = replace_batch(state.visibility, b).full(positions[b : b + 1])[0][:, at]
        count = seen.sum(0).clamp(min=1)
        out[b, :, : len(at)] = maps[b, :, :, : len(at)].sum(1) / count
    return out


def working_dtype(state: LayerState) -> torch.dtype:
    """float64 for float64 models, else float32."""
    return torch.float64 if state.q.dtype == torch.float64 else torch.float32


def _tiles(
    state: LayerState, positions: Tensor, columns: Tensor, spec: AlignSpec
) -> Iterator[tuple[int, slice, Tensor]]:
    """(sample, rows, map [G, rows, columns of the sample]), a tile of rows at a time."""
    batch, heads, rows = state.q.shape[:3]
    dtype = working_dtype(state)
    size = max(1, TILE_BYTES // (heads * state.k.shape[2] * torch.finfo(dtype).bits // 8))
    plain = replace(spec, normalize="joint") if spec.normalize == "visual" else spec
    with torch.no_grad():
        for b in range(batch):
            at = columns[b].nonzero().flatten()
            seen = replace_batch(state.visibility, b)
            for start in range(0, rows, size):
                part = slice(start, start + size)
                keys = seen.full(positions[b : b + 1, part])
                compared = (keys & columns[b]).unsqueeze(1)
                q, k = state.q[b : b + 1, :, part], state.k[b : b + 1]
                side = Side(q, k, None, state.sinks, state.scale, state.softcap or 0.0, plain)
                swept = keys if plain.sweeps_all_keys else compared.squeeze(1)
                maps, _ = group_map(side, swept, compared, None, dtype)
                yield b, part, maps[0][..., at]


def first_rows(maps: Tensor, positions: Tensor) -> Tensor:
    """[B, G, R, C] with the rows that are used (position >= 0) first, in their order."""
    order = (positions < 0).to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None]
    return maps.gather(2, order.expand(-1, maps.shape[1], -1, maps.shape[3]))


def replace_batch(visibility: Visibility, b: int) -> Visibility:
    """The descriptors of one sample, with a batch dimension of 1."""
    blocks = None if visibility.blocks is None else visibility.blocks[b : b + 1]
    return replace(visibility, segments=visibility.segments[b : b + 1], blocks=blocks)


# ------------------------------------------------------------------ loss inside a forward


def form_loss(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)``, a scalar, with its gradient formed at once.

    Called inside the student's attention: when it returns, the teacher's q and k are no longer
    needed, and what is kept for the backward is d loss / d input alone. Nothing is saved through
    the saved-tensor hooks that are in force: a checkpoint would count the tensors, and would run
    the layer again to have them back, where the teacher is long gone.
    """
    needs = [x is not None and x.requires_grad for x in inputs]
    with own_saving(), _no_autocast(inputs):
        if not (torch.is_grad_enabled() and any(needs)):
            with torch.no_grad():
                return function(*inputs)
        loss: Tensor = _Formed.apply(function, *inputs)
        return loss


class _Formed(torch.autograd.Function):
    """loss and d loss / d inputs now; backward multiplies by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip(inputs, needs, strict=True)
            ]
            loss = function(*leaves)
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need and x is not None]
            gradients = torch.autograd.grad(loss, wanted)
        ctx.save_for_backward(*gradients)
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        return (
            None,
            *(next(saved).mul(upstream) if need else None for need in ctx.needs_input_grad[1:]),
        )


@contextmanager
def own_saving() -> Iterator[None]:
    """Save tensors as they are, whatever saved-tensor hooks (a checkpoint's) are in force."""
    with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        yield


def _unchanged(x: Tensor) -> Tensor:
    return x


@contextmanager
def _no_autocast(inputs: Sequence[Tensor | None]) -> Iterator[None]:
    """The arithmetic is float32 whatever autocast says; q and k come in what the model computed."""
    device = next(x for x in inputs if x is not None).device.type
    with torch.autocast(device, enabled=False):
        yield
