"""Kernels against the definition, on a GPU if there is one, else under triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, so these tests run in a
process of their own: ``tests/triton/test_*.py`` start it. Sizes are tiny: a program of the interpreter
takes a millisecond and more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastalign import AlignSpec
from fastalign.backends.triton import interpreting

from ...problems import Inputs, relative_errors

DEVICE = "cpu" if interpreting() else "cuda"


def on_device(inputs: Inputs) -> Inputs:
    """The same inputs where the kernels run."""
    keywords = {
        name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.keywords.items()
    }
    q_t, k_t = (None if x is None else x.to(DEVICE) for x in (inputs.q_t, inputs.k_t))
    return Inputs(inputs.q_s.to(DEVICE), inputs.k_s.to(DEVICE), q_t, k_t, keywords)


def run(inputs: Inputs, spec: AlignSpec | str, **more: Any) -> list[Tensor]:
    """[loss, dq, dk, (dmix)] of the kernels.

    In a thread of its own, whose stack is short: where the interpreter's calls cross the end of a chunk of
    CPython's frame stack, each of them maps and unmaps a chunk, which took half of the time of a test.
    """
    more = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in more.items()}
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(on_device(inputs).run, spec, "triton", **more).result()
    return [x.cpu() for x in result]


def inside(x: Tensor, pad: int = 5) -> Tensor:
    """The same values as a view into a larger buffer that is NaN everywhere else."""
    big = torch.full([n + 2 * pad for n in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    view = big[tuple(slice(pad, pad + n) for n in x.shape)]
    view.copy_(x)
    return view


def check(
    inputs: Inputs, spec: AlignSpec | str, *, largest: float = 1.0, **more: Any
) -> list[Tensor]:
    """Kernels within twice the error that torch makes in the same precision, both against float64.

    Returns what the kernels gave. Slack: a few roundings of the result's own type, for where torch
    happens to be exact; the second product of the gradients takes its operands in that type.

    Args:
        largest: size of the logits beyond the ordinary. A probability is 2 to a difference of logits,
            each of which is rounded to fp32: its relative error is as many roundings.
    """
    result = run(inputs, spec, **more)
    exact = inputs.to(torch.float64).run(spec, "reference", **_double(more))
    own = inputs.run(spec, "reference", **more)
    got, want, other = (float(x[0]) for x in (result, exact, own))
    slack = 8 * torch.finfo(torch.float32).eps * max(1.0, abs(want))
    assert abs(got - want) <= 2 * abs(other - want) + slack, (got, want, other)
    errors, yardsticks = relative_errors(result, exact), relative_errors(own, exact)
    for x, y, error, limit in zip(result[1:], exact[1:], errors[1:], yardsticks[1:], strict=True):
        assert torch.isfinite(x).all()
        slack = 8 * torch.finfo(x.dtype).eps + largest * torch.finfo(torch.float32).eps
        allowed = 2 * limit + slack
        if y.abs().max() < 1e-30:  # nothing but what underflows
            assert x.abs().max() < 1e-6
        else:
            assert error <= allowed, (error, allowed)
    return result


def _double(more: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in more.items()
    }
