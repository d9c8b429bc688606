"""The forward of pooled maps: the mean attention to each visual column, and 1 - cos of the two models'.

What flash-colreduce computes (one side, no gradient) is half of it; so here it has a fair comparison. A
provider is made for a case and returns (loss,).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fastalign import AlignSpec

from .case import Case, Step
from .providers import Provider, applies, attention_map, cosine_loss, fastalign_loss
from .shapes import Shape


def eager_rows(case: Case) -> Step:
    """Eager on the compared rows: the maps, then their means over the rows that see a column."""
    seen = (~case.hidden[:, case.columns]).sum(0)

    def side(q: Tensor, k: Tensor) -> Tensor:
        return attention_map(q.float(), k.float(), case.hidden, case.columns).sum(1) / seen

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return (cosine_loss(side(case.q_s, case.k_s), side(case.q_t, case.k_t)),)

    return step


def flash_colreduce(case: Case) -> Step:
    """The package flash-colreduce (CUDA): column sums of both models; it wants a key head for each head."""
    from flash_colreduce import flash_colreduce as reduce  # type: ignore[import-not-found]

    def side(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return reduce(q, k, "sum", is_causal=True)[..., case.columns].float().mean(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return (cosine_loss(side(case.q_s, case.k_s), side(case.q_t, case.k_t)),)

    return step


def _fastalign(backend: str) -> Provider:
    def make(case: Case) -> Step:
        loss = fastalign_loss(case, backend, AlignSpec(compare="pooled"))

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (loss(),)

        return step

    return make


POOLED: dict[str, Provider] = {
    "eager_rows": eager_rows,
    "flash_colreduce": flash_colreduce,
    **{backend: _fastalign(backend) for backend in ("tiled", "cpu", "triton")},
}


def pooled_applies(provider: str, shape: Shape, limit: int, device: str = "cpu") -> str:
    """Why a provider is left out of a shape; "" if it is not."""
    if provider != "flash_colreduce":
        return applies(provider, shape, limit, device)
    if importlib.util.find_spec("flash_colreduce") is None:
        return "the package flash-colreduce is not installed"
    if device == "cpu":
        return "runs on GPUs"
    if shape.rows != "text":
        return "takes the last rows of a sequence only"
    return ""
