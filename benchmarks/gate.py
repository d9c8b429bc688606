"""The correctness gate: a provider whose loss or gradients are off gets no figure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .case import Case, Step
from .modes import Mode

#: Largest error, of the largest entry of each result, against the oracle's float32 arithmetic on the same
#: numbers. 16-bit results carry eight bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


def error(case: Case, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest difference of an entry over the largest entry, of loss and gradients."""
    worst = 0.0
    for x, exact in zip(got, want, strict=True):
        if x.shape != exact.shape:  # the whole sequence's dq: compare its rows
            x = x[:, :, case.rows]
        size = exact.float().abs().max().clamp(min=1e-3)
        apart = float((x.float() - exact.float()).abs().max() / size)
        worst = apart if apart != apart else max(worst, apart)  # NaN stays
        if worst != worst:
            break
    return worst


def check(case: Case, mode: Mode, steps: Mapping[str, Step]) -> dict[str, str]:
    """What is wrong with each provider; "" for those that are right. Each step runs once."""
    want = mode.providers[mode.oracle(case.shape)](case)()
    limit = TOLERANCE[case.shape.dtype]
    verdicts = {}
    for name, step in steps.items():
        try:
            apart = error(case, step(), want)
        except (
            Exception
        ) as problem:  # a provider of any kind: its failure is a verdict, told and counted
            verdicts[name] = f"{type(problem).__name__}: {problem}"
            continue
        verdicts[name] = "" if apart <= limit else f"error {apart:.1e}, allowed {limit:.0e}"
    return verdicts
