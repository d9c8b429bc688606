"""What this machine can do, measured in the process that is judged by it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """Rates a second: multiply-adds count as two FLOP; exponentials; bytes copied (read + written)."""

    gemm: dict[str, float]
    exp: float
    copy: float

    def floor_seconds(self, shape: Shape) -> tuple[float, float]:
        """The least (GEMM, exponential) time of one forward and backward of a shape.

        Per visible (row, key, head): the student's scores, their recomputation, dq and dk are 8 D FLOP,
        the teacher's scores 2 D; exponentials 2 and 1.
        """
        (h_s, h_t), pairs = shape.heads, shape.pairs()
        flops = pairs * shape.size * (8 * h_s + 2 * h_t)
        rate = max(self.gemm["float32"], self.gemm.get(str(shape.dtype).removeprefix("torch."), 0))
        return flops / rate, pairs * (2 * h_s + h_t) / self.exp


def _rate(work: float, run: Callable[[], object], repeats: int = 9) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return work / statistics.median(times)


def measure() -> Ceilings:
    """The best product of several shapes for each type; exponentials in cache; a copy out of it."""
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        best = 0.0
        for m, n, k in ((200, 1100, 128), (1100, 128, 200), (1024, 1024, 1024), (512, 4096, 128)):
            a, b = torch.rand(m, k).to(dtype), torch.rand(k, n).to(dtype)
            out = torch.empty(m, n, dtype=dtype)
            best = max(best, _rate(2.0 * m * n * k, partial(torch.mm, a, b, out=out)))
        gemm[str(dtype).removeprefix("torch.")] = best
    x = -torch.rand(2**17)
    y = torch.empty_like(x)
    exp = _rate(2.0**17 * 20, lambda: [torch.exp(x, out=y) for _ in range(20)])
    big, other = torch.rand(2**25), torch.empty(2**25)
    copy = _rate(2 * 4 * 2.0**25, lambda: other.copy_(big))
    return Ceilings(gemm, exp, copy)
