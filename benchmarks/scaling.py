"""Whether time is linear in rows x keys: `python -m benchmarks.scaling [--backend cpu]`.

Times one forward and backward over a grid of row and key counts (one pair of layers, 8/10 heads, d 64, text
rows at the end of the sequence) and fits milliseconds = a + b x (rows x keys) by least squares on relative
errors, and the exponent of the power law through the larger half. Linear means: an exponent near 1, and no
point far from the line.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from .case import Case
from .clock import cpu_clock
from .providers import OURS, PROVIDERS
from .shapes import Shape

ROWS = (64, 128, 256, 512)
KEYS = (1024, 4096, 16384)


def line(work: list[float], times: list[float]) -> tuple[float, float]:
    """(a, b) of t = a + b w with the least sum of squared relative errors."""
    weights = [1 / t**2 for t in times]
    total = sum(weights)
    w = sum(p * x for p, x in zip(weights, work, strict=True)) / total
    t = sum(p * y for p, y in zip(weights, times, strict=True)) / total
    above = sum(p * (x - w) * (y - t) for p, x, y in zip(weights, work, times, strict=True))
    b = above / sum(p * (x - w) ** 2 for p, x in zip(weights, work, strict=True))
    return t - b * w, b


def exponent(work: list[float], times: list[float]) -> float:
    """The slope of log t over log w, by least squares."""
    x, y = [math.log(w) for w in work], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", default="cpu", choices=OURS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    measured: list[tuple[float, float]] = []
    print(
        f"{options.backend}, {torch.get_num_threads()} threads\n  rows   keys  rows x keys       ms"
    )
    for keys in KEYS:
        for rows in ROWS:
            shape = Shape("", keys + rows, 0, keys, (8, 10), (8, 10), 64, count=rows)
            step = PROVIDERS[options.backend](Case.of(shape))
            step()
            took = statistics.median(cpu_clock(step) for _ in range(options.repeats))
            measured.append((float(shape.pairs()), took))
            print(f"{rows:6} {keys:6} {shape.pairs():12} {took:8.2f}")
    measured.sort()
    work, times = [w for w, _ in measured], [t for _, t in measured]
    a, b = line(work, times)
    worst = max(abs(a + b * w - t) / t for w, t in measured)
    half = len(work) // 2
    print(f"ms = {a:.3f} + {b * 1e6:.3f} x (millions of rows x keys); worst point {worst:.0%} off")
    print(f"exponent over the larger half: {exponent(work[half:], times[half:]):.3f}")


if __name__ == "__main__":
    main()
