"""Random calls: any shape, mask, head ratio and spec.

Sizes are what an interpreted program of a millisecond and more allows: up to 24 positions and 4 heads,
which are several tiles of the interpreter's configuration. The examples come in pieces with a seed each, so
that a failure is found again within a minute (``-k "piece3"``).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, seed, settings
from torch import Tensor

from fastalign import AlignSpec

from ...problems import Inputs, relative_errors
from ...strategies import SPECS, calls
from .common import run

CALLS = calls(
    specs=SPECS,
    max_length=24,
    max_heads=4,
    sizes=(3, 17),
    dtypes=(torch.float32, torch.float32, torch.float16),
    empty=False,
)


def test_any_call_is_finite_and_right() -> None:
    _piece(0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(1, 9), ids="piece{}".format)
def test_many_more_calls(piece: int) -> None:
    """320 examples in all, each of which compares something."""
    _piece(piece, 40)


def _piece(number: int, examples: int) -> None:
    compared = 0

    @seed(number)
    @settings(max_examples=examples)
    @given(call=CALLS)
    def check(call: tuple[AlignSpec, Inputs]) -> None:
        nonlocal compared
        spec, inputs = call
        exact = inputs.to(torch.float64).run(spec, "reference")
        assume(exact[1].any())  # calls that compare nothing are cheap, and would be half of all
        _check(spec, inputs, exact)
        compared += 1

    check()
    assert compared >= examples


def _check(spec: AlignSpec, inputs: Inputs, exact: list[Tensor]) -> None:
    """Finite; where logits are no larger than a model's, within twice torch's own error and roundings.

    A probability is 2 to the difference of a score and a log-sum-exp that were rounded to fp32 apart: an
    error of their size in roundings. At logits of 10,000 that is a percent of every probability, and
    gradients that cancel to 1e-30 are noise.
    """
    result = run(inputs, spec)
    own = inputs.run(spec, "reference")
    largest = max(_largest_logit(inputs.q_s, inputs.k_s), _largest_logit(inputs.q_t, inputs.k_t))
    errors, yardsticks = relative_errors(result, exact), relative_errors(own, exact)
    for got, want, error, yardstick in zip(result, exact, errors, yardsticks, strict=True):
        if want.numel() and want.abs().max() > torch.finfo(got.dtype).max / 2:
            continue  # gradients of scores to 1e4 that float16 cannot hold
        assert torch.isfinite(got).all()
        if spec.sink_sigma is not None or largest > 1000:
            continue  # a threshold may fall on an entry, where one rounding decides
        slack = 32 * torch.finfo(got.dtype).eps + 8 * largest * torch.finfo(torch.float32).eps
        allowed = 2 * yardstick
        size = want.abs().max() if want.numel() else 0.0
        assert error <= allowed + slack or error * size < 1e-6, (error, allowed, slack)


def _largest_logit(q: Tensor | None, k: Tensor | None) -> float:
    assert q is not None
    assert k is not None
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return float((q.double() @ k.transpose(-1, -2)).abs().max()) / q.shape[-1] ** 0.5
