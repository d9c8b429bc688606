"""Random calls: any shape, mask, head ratio and spec."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fastalign import AlignSpec

from ...problems import Inputs, relative_error
from ...strategies import SPECS, calls
from .common import run

CALLS = calls(
    specs=SPECS,
    max_length=19,
    max_heads=2,
    sizes=(3, 17),
    dtypes=(torch.float32, torch.float32, torch.float16),
)


@settings(max_examples=60)
@given(call=CALLS)
def test_any_call_is_finite_and_right(call: tuple[AlignSpec, Inputs]) -> None:
    _check(*call)


@pytest.mark.slow
@settings(max_examples=320)
@given(call=CALLS)
def test_many_more_calls(call: tuple[AlignSpec, Inputs]) -> None:
    _check(*call)


def _check(spec: AlignSpec, inputs: Inputs) -> None:
    result = run(inputs, spec)
    exact = inputs.to(torch.float64).run(spec, "reference")
    own = inputs.run(spec, "reference")
    for got, want, yardstick in zip(result, exact, own, strict=True):
        if want.numel() and want.abs().max() > torch.finfo(got.dtype).max / 2:
            continue  # gradients of scores to 1e4 that float16 cannot hold
        assert torch.isfinite(got).all()
        if spec.sink_sigma is not None:
            continue  # a threshold may fall on an entry, where one rounding decides
        eps = torch.finfo(got.dtype).eps
        error, allowed = relative_error(got, want), 2 * relative_error(yardstick, want)
        size = want.abs().max() if want.numel() else 0.0
        assert error <= allowed + 32 * eps or error * size < 1e-6
