"""The spec matrix: every spec's loss and gradients."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from fastalign import AlignSpec

from ...problems import every_spec, random_inputs, spec_id
from .common import check


def _chosen() -> list[tuple[AlignSpec, bool]]:
    """One spec of each (heads, normalize, divergence), compare and the filter taking turns; and extras."""
    specs = sorted(every_spec(), key=lambda s: (s.heads, s.normalize, s.divergence))
    out = []
    for turn, (_, group) in enumerate(
        groupby(specs, key=lambda s: (s.heads, s.normalize, s.divergence))
    ):
        members = list(group)
        out.append((members[(5 * turn) % len(members)], turn % 2 == 0))
    return out


def _name(value: AlignSpec | bool) -> str:
    return str(value) if isinstance(value, bool) else spec_id(value)


def _tiny(spec: AlignSpec, dtype: torch.dtype, extras: bool):  # type: ignore[no-untyped-def]
    return random_inputs(
        spec, length=21, heads=(2, 3), key_heads=(1, 3), sizes=(8, 5), extras=extras, dtype=dtype
    )


@pytest.mark.parametrize(("spec", "extras"), _chosen(), ids=_name)
def test_each_kind_of_spec(spec: AlignSpec, extras: bool) -> None:
    check(_tiny(spec, torch.float32, extras), spec)


HALVES = [
    AlignSpec(),
    AlignSpec(heads="each", divergence="kl", compare="row"),
    AlignSpec(normalize="visual", divergence="js", compare="row"),
    AlignSpec(compare="pooled", divergence="mse"),
    AlignSpec(heads="mix", normalize="none", divergence="mse"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", HALVES, ids=spec_id)
def test_half_precision(spec: AlignSpec, dtype: torch.dtype) -> None:
    """float16 keeps gradients of 1e-9 and below (``_head_tensors``); bf16 is upcast when interpreted."""
    check(_tiny(spec, torch.float32, False).to(dtype), spec)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_every_spec(spec: AlignSpec, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and spec.sink_sigma is not None:
        pytest.skip("a threshold may fall between an entry and its rounding")
    check(_tiny(spec, torch.float32, True).to(dtype), spec)
