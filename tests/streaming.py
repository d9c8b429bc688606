"""Checks that every streaming backend passes, by its name."""

from __future__ import annotations

import torch

from fastalign import AlignSpec

from .problems import Inputs, random_inputs, relative_error, relative_errors


def check_precision(backend: str, spec: AlignSpec, dtype: torch.dtype) -> None:
    """Loss and gradients within twice torch's own error, against float64 on the same numbers.

    The yardstick is the materialised reference in the same precision.
    """
    inputs = random_inputs(spec, length=65, heads=(4, 4), key_heads=(2, 2), sizes=(16, 16))
    inputs = inputs.to(dtype)
    exact = inputs.to(torch.float64).run(spec, "reference")
    yardstick = inputs.run(spec, "reference")
    result = inputs.run(spec, backend)
    # a loss is a sum of numbers of order 1 (1 - cos, logarithms): four roundings of slack
    got, own, want = (float(x[0]) for x in (result, yardstick, exact))
    slack = 4 * torch.finfo(torch.float32).eps * max(1.0, abs(want))
    assert abs(got - want) <= 2 * abs(own - want) + slack
    errors, allowed = relative_errors(result, exact), relative_errors(yardstick, exact)
    for grad, error, limit in zip(result[1:], errors[1:], allowed[1:], strict=True):
        slack = 4 * torch.finfo(grad.dtype).eps  # where the yardstick happens to be exact
        assert error <= 2 * limit + slack


def check_any_call(backend: str, spec: AlignSpec, inputs: Inputs) -> None:
    """No NaN, whatever the call; in float64 the definition's numbers."""
    result = inputs.run(spec, backend)
    for x in result:
        assert torch.isfinite(x).all()
    if inputs.q_s.dtype == torch.float64 and spec.sink_sigma is None:
        # a sink threshold may fall on an entry, where one rounding decides
        exact = inputs.run(spec, "reference")
        for got, want in zip(result, exact, strict=True):
            assert relative_error(got, want) < 1e-8 or (got - want).abs().max() < 1e-10
