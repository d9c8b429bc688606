"""Hypothesis strategies: whole calls, from the ordinary to the absurd."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from fastalign import AlignSpec

from .problems import Inputs, every_spec

SPECS = list(every_spec())


@st.composite
def calls(
    draw: st.DrawFn,
    specs: list[AlignSpec] | None = None,
    max_length: int = 70,
    max_heads: int = 6,
    sizes: tuple[int, int] = (8, 80),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16),
    empty: bool = True,
) -> tuple[AlignSpec, Inputs]:
    """A spec and inputs for it: unequal sides, any mask, any stride, logits up to +-1e4.

    ``empty``: also batches of 0 samples, and masks that leave nothing to compare, which make up two thirds
    of all calls; without them most calls run every kernel.
    """
    spec = draw(st.sampled_from(specs or SPECS))
    batch, length = draw(st.integers(0 if empty else 1, 3)), draw(st.integers(1, max_length))
    h_s, h_t = draw(st.integers(1, max_heads)), draw(st.integers(1, max_heads))
    if spec.heads == "each":
        h_t = h_s
    k_s, k_t = draw(st.sampled_from(_divisors(h_s))), draw(st.sampled_from(_divisors(h_t)))
    d_s, d_t = draw(st.integers(*sizes)), draw(st.integers(*sizes))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # |q . k| / sqrt(D) of about ``logits``, shared between q and k
    logits = draw(st.sampled_from([1.0, 1.0, 30.0, 1e4]))
    transposed = draw(st.booleans())

    def heads_of(count: int, size: int) -> torch.Tensor:
        x = normal(batch, count, length, size) * logits**0.5
        if transposed:  # [B, L, H, D] in memory, as attention modules have it
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.to(dtype)

    keywords: dict[str, Any] = {
        "visual_mask": draw(_masks(generator, batch, length, empty)),
        "attention_mask": draw(_padding(generator, batch, length, empty)),
        "query_mask": draw(_masks(generator, batch, length, empty)),
        "causal": draw(st.booleans()),
    }
    if spec.heads == "mix":
        keywords["mix"] = normal(h_s, h_t).to(dtype)
    if draw(st.booleans()):
        weight = torch.rand((batch, length), generator=generator)
        keywords["row_weight"] = weight * (weight > 0.3)
    if draw(st.booleans()):
        keywords["block_ids"] = torch.randint(-1, 2, (batch, length), generator=generator)
    if draw(st.booleans()):
        keywords["segment_ids"] = torch.randint(0, 3, (batch, length), generator=generator)
    if draw(st.booleans()):
        keywords["window"] = draw(st.integers(1, length + 3))
    if draw(st.booleans()):
        keywords["chunk"] = draw(st.integers(1, length + 3))
    if draw(st.booleans()):
        keywords["softcap_s"], keywords["softcap_t"] = 20.0, 30.0
    if draw(st.booleans()) and spec.normalize != "none":
        keywords["sink_s"], keywords["sink_t"] = normal(h_s), normal(h_t)
    return spec, Inputs(
        heads_of(h_s, d_s), heads_of(k_s, d_s), heads_of(h_t, d_t), heads_of(k_t, d_t), keywords
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def _masks(
    draw: st.DrawFn, generator: torch.Generator, batch: int, length: int, empty: bool
) -> torch.Tensor:
    """No position, every position, a run, or a random set; each sample its own."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        kind = draw(st.sampled_from(["none", "all", "run", "random"][0 if empty else 1 :]))
        if kind == "all":
            mask[b] = True
        elif kind == "run":
            start = draw(st.integers(0, length - 1))
            mask[b, start : draw(st.integers(start, length))] = True
        elif kind == "random":
            mask[b] = torch.rand(length, generator=generator) < 0.4
    return mask


@st.composite
def _padding(
    draw: st.DrawFn, generator: torch.Generator, batch: int, length: int, empty: bool
) -> torch.Tensor:
    """Valid positions: padding on the left, the right, everywhere or nowhere."""
    valid = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        kind = draw(st.sampled_from(["none", "left", "right", "all"][: None if empty else 3]))
        cut = draw(st.integers(0, length))
        if kind == "left":
            valid[b, :cut] = False
        elif kind == "right":
            valid[b, cut:] = False
        elif kind == "all":
            valid[b] = False
    return valid
