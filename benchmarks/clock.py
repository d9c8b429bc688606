"""Milliseconds of one step, on a CPU or a GPU, and rounds in which the providers take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Runs something once and says how many milliseconds it took.
Clock = Callable[[Callable[[], object]], float]


def cpu_clock(step: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


class CudaClock:
    """Time between two events of the stream, on a cold L2: a cache-sized buffer is written before each."""

    def __init__(self, flush_bytes: int = 256 * 2**20) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")

    def __call__(self, step: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed


def missing(device: str) -> str:
    """Why nothing can be measured on a kind of device here; "" if it can."""
    if device == "cpu" or torch.cuda.is_available():
        return ""
    return "torch finds no GPU on this machine"


def clock_for(device: str) -> Clock:
    """The clock of a kind of device."""
    return cpu_clock if device == "cpu" else CudaClock()


def rounds(
    steps: Mapping[str, Callable[[], object]],
    clock: Clock,
    count: int,
    seconds: float,
    at_least: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds of each provider, interleaved: round i of one stands beside round i of the others.

    Args:
        count: rounds. seconds: what one provider may take in all; a slow one stops after fewer rounds,
            but not before ``at_least``.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            taken = times[name]
            if len(taken) < at_least or sum(taken) < 1e3 * seconds:
                taken.append(clock(step))
    return times


def spread(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]
