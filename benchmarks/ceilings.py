"""What this machine can do, measured in the process that is judged by it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .clock import Clock, cpu_clock
from .shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """Rates a second: multiply-adds count as two FLOP; exponentials; bytes copied (read + written)."""

    gemm: dict[str, float]
    exp: float
    copy: float

    def floor_seconds(self, shape: Shape, mode: str = "fwd+bwd") -> tuple[float, float]:
        """The least (GEMM, exponential) time of one step of a shape.

        Per visible (row, key, head): the scores of both models, 2 D FLOP; with gradients dq and dk, 4 D
        more; one exponential for each model. Computing scores twice counts against the provider.
        """
        (h_s, h_t), pairs = shape.heads, shape.pairs()
        flops = pairs * shape.size * ((6 if mode == "fwd+bwd" else 2) * h_s + 2 * h_t)
        rate = max(self.gemm["float32"], self.gemm.get(str(shape.dtype).removeprefix("torch."), 0))
        return flops / rate, pairs * (h_s + h_t) / self.exp

    def metrics(self) -> dict[str, float]:
        """By name, in GFLOP/s, billions of exponentials a second, GB/s."""
        named = {f"gemm_{dtype}_gflops": rate / 1e9 for dtype, rate in self.gemm.items()}
        return {**named, "exp_g_per_s": self.exp / 1e9, "copy_gb_per_s": self.copy / 1e9}


def _rate(work: float, run: Callable[[], object], clock: Clock, repeats: int = 9) -> float:
    run()
    return work / (1e-3 * statistics.median(clock(run) for _ in range(repeats)))


#: Products (m, n, k) whose best rate is a device's; larger ones on a GPU, which small ones do not fill.
PRODUCTS = {
    "cpu": ((200, 1100, 128), (1100, 128, 200), (1024, 1024, 1024), (512, 4096, 128)),
    "cuda": ((2048, 2048, 2048), (8192, 8192, 8192)),
}


def measure(device: str = "cpu", clock: Clock = cpu_clock) -> Ceilings:
    """The best product of several shapes for each type; exponentials; a copy out of the cache.

    Exponentials on a CPU are torch.exp in cache, on a GPU a kernel of their own (``exponentials``).
    """
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        best = 0.0
        for m, n, k in PRODUCTS[device]:
            a = torch.rand(m, k, device=device).to(dtype)
            b = torch.rand(k, n, device=device).to(dtype)
            out = torch.empty(m, n, dtype=dtype, device=device)
            best = max(best, _rate(2.0 * m * n * k, partial(torch.mm, a, b, out=out), clock))
        gemm[str(dtype).removeprefix("torch.")] = best
    work, run = _exponentials() if device == "cpu" else _exponentials_of_gpu(device)
    exp = _rate(work, run, clock)
    big, other = torch.rand(2**25, device=device), torch.empty(2**25, device=device)
    copy = _rate(2 * 4 * 2.0**25, lambda: other.copy_(big), clock)
    return Ceilings(gemm, exp, copy)


def _exponentials() -> tuple[float, Callable[[], object]]:
    """(how many exponentials a run takes, the run) on a CPU."""
    x = -torch.rand(2**17)
    y = torch.empty_like(x)
    return 20.0 * len(x), lambda: [torch.exp(x, out=y) for _ in range(20)]


def _exponentials_of_gpu(device: str) -> tuple[float, Callable[[], object]]:
    """The same on a GPU, for which triton is needed."""
    from .exponentials import exponentials

    return exponentials(device)
