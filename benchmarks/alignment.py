"""The alignment loss, forward and backward, by every provider: `python -m benchmarks.alignment`.

The correctness gate comes first: a provider whose loss or gradients are off gets no figure. Providers are
then interleaved, so that a ratio compares neighbours in time. One row of the CSV per shape, provider and
metric: milliseconds (p20, p50, p80), peak MiB, the factor over the fastest peer (paired within rounds), and
the measured roofline over the time.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path

import torch

import fastalign
from fastalign.backends import cpu as kernels

from . import ceilings as machine
from .providers import PEERS, PROVIDERS, Case, Step, applies
from .shapes import REQUIRED, SHAPES, Shape

COLUMNS = (
    *("kernel", "shape", "dtype", "provider", "mode", "metric", "x"),
    *("p20", "p50", "p80", "n", "device", "version"),
)
#: Of the largest entry, against eager in float32 on the same numbers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06}


def gate(case: Case, steps: dict[str, Step]) -> list[str]:
    """The providers whose loss and gradients agree with float32 eager; says which do not."""
    want = PROVIDERS[_oracle(case.shape)](case)()
    green = []
    for name, step in steps.items():
        error = 0.0
        for got, exact in zip(step(), want, strict=True):
            if got.shape != exact.shape:  # the whole sequence's dq: compare its rows
                got = got[:, :, case.rows]
            size = exact.float().abs().max().clamp(min=1e-3)
            error = max(error, float((got.float() - exact.float()).abs().max() / size))
        if error <= TOLERANCE[case.shape.dtype]:
            green.append(name)
        else:
            print(f"RED: {case.shape.name} {name}: error {error:.1e}, no figure", file=sys.stderr)
    return green


def _oracle(shape: Shape) -> str:
    return "eager_rows" if shape.dtype == torch.float32 else "eager_rows_upcast"


def peak_mib(step: Step) -> float:
    """Peak of torch's tensors plus the kernels' own workspace, beyond the inputs."""
    kernels.peak_workspace()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    tensors = max(accumulate((e.nbytes() for e in events), initial=0))
    return float(tensors + kernels.peak_workspace()) / 2**20


def rounds(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """Milliseconds of each provider, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _spread(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(REQUIRED), choices=list(SHAPES))
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit-gib", type=float, default=6, help="leave out what needs more")
    parser.add_argument("--out", type=Path, default=Path("out/alignment.csv"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    device = f"{platform.processor() or platform.machine()} x{torch.get_num_threads()}"
    version = f"{fastalign.__version__}/torch{torch.__version__}"
    rates = machine.measure()
    print(f"{device}: {rates}")
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name in options.shapes:
            shape, case = SHAPES[name], Case.of(SHAPES[name])
            steps = {}
            for provider in options.providers:
                reason = applies(provider, shape, int(options.limit_gib * 2**30))
                if reason:
                    print(f"{name} {provider}: left out, {reason}")
                else:
                    steps[provider] = PROVIDERS[provider](case)
            steps = {provider: steps[provider] for provider in gate(case, steps)}
            times = rounds(steps, options.rounds)
            gemm, exps = (1e3 * x for x in rates.floor_seconds(shape))
            peers = [p for p in PEERS if p in times]
            best = min(peers, key=lambda p: statistics.median(times[p])) if peers else None
            for provider, values in times.items():
                table = {"time_ms": values, "peak_mib": [peak_mib(steps[provider])]}
                table["roofline"] = [max(gemm, exps) / t for t in values]
                if best:
                    table[f"factor_over_{best}"] = [
                        b / t for b, t in zip(times[best], values, strict=True)
                    ]
                for metric, numbers in table.items():
                    spread = _spread(numbers)
                    writer.writerow([
                        "align", name, str(shape.dtype)[6:], provider, "fwd+bwd", metric,
                        shape.visual, *(f"{x:.4g}" for x in spread), len(numbers), device, version,
                    ])  # fmt: skip
                    print(f"{name:24} {provider:28} {metric:34} {spread[1]:10.3f}")
            if name in REQUIRED:
                print(f"{name}: required factor of cpu over {best}: {REQUIRED[name]}")
            file.flush()


if __name__ == "__main__":
    main()
