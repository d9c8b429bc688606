"""The alignment loss by every provider: `python -m benchmarks.alignment`, or `fastalign bench`.

The correctness gate comes first: a provider whose loss or gradients are off gets no figure, and the exit
code is 1. Providers are then interleaved, so that a ratio compares neighbours in time. One row of the CSV
per shape, provider and metric (``benchmarks.table``): milliseconds (p20, p50, p80), peak MiB of tensors and
workspace, peak resident set, the factor over the fastest peer (paired within rounds), and over the time
the measured roofline: the larger of products and exponentials, or both in turn. A provider that does not
fit or does not apply is left out with its reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import ceilings as machine
from .case import Case, Step
from .clock import Clock, clock_for, missing, rounds, spread
from .gate import check
from .memory import resident_mib, step_bytes
from .modes import MODES
from .providers import PEERS
from .shapes import REQUIRED, SHAPES
from .table import Row, device_name, version, write


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shapes, providers, modes: names; no provider: all.
        rounds: interleaved runs of each provider. seconds: what one provider may take of them; a slow one
            gets fewer rounds, three at least.
        limit_gib: providers that need more are left out.
        device: "cpu" or "cuda".
        resident: whether to take the resident set, in a process for each shape and provider (CPU only).
    """

    shapes: tuple[str, ...] = tuple(REQUIRED)
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("fwd+bwd",)
    rounds: int = 9
    seconds: float = 20
    limit_gib: float = 6
    device: str = "cpu"
    resident: bool = True


@dataclass
class Outcome:
    """Rows for the CSV, and what the gate refused: (shape, provider, why)."""

    rows: list[Row] = field(default_factory=list)
    red: list[tuple[str, str, str]] = field(default_factory=list)


class Bench:
    """One run over shapes and modes."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self.outcome = Outcome()
        self._clock: Clock = clock_for(options.device)
        self._device, self._version = device_name(options.device), version()
        self._rates = machine.measure(options.device, self._clock)

    def run(self) -> Outcome:
        """Everything that the options name."""
        self._say(f"{self._device}; {self._version}")
        for metric, value in self._rates.metrics().items():
            self._add("machine", "machine", "float32", "machine", "", metric, 0, [value])
        for shape in self.options.shapes:
            for mode in self.options.modes:
                self._one(shape, mode)
        return self.outcome

    def _one(self, name: str, mode: str) -> None:
        shape, kind = SHAPES[name], MODES[mode]
        torch.compiler.reset()  # after eight shapes torch would run a compiled provider eagerly
        case = Case.of(shape, self.options.device)
        steps: dict[str, Step] = {}
        wanted = self.options.providers or tuple(kind.providers)
        for provider in (p for p in kind.providers if p in wanted):
            limit = int(self.options.limit_gib * 2**30)
            reason = kind.applies(provider, shape, limit, self.options.device)
            if reason:
                self._result(name, mode, provider, "left_out", [0.0], reason)
            else:
                steps[provider] = kind.providers[provider](case)
        self._say(f"{name}, {mode}: {', '.join(steps)}")
        for provider, wrong in check(case, kind, steps).items():
            if wrong:
                self.outcome.red.append((name, provider, wrong))
                del steps[provider]
        times = rounds(steps, self._clock, self.options.rounds, self.options.seconds)
        floors = [1e3 * x for x in self._rates.floor_seconds(shape, mode)]
        peers = [p for p in PEERS if p in times]
        best = min(peers, key=lambda p: statistics.median(times[p])) if peers else None
        for provider, taken in times.items():
            self._result(name, mode, provider, "time_ms", taken)
            self._result(name, mode, provider, "roofline", [max(floors) / t for t in taken])
            self._result(name, mode, provider, "in_turn", [sum(floors) / t for t in taken])
            if best:
                paired = zip(times[best], taken, strict=False)  # a slow one has fewer rounds
                factors = [b / t for b, t in paired]
                self._result(name, mode, provider, f"factor_over_{best}", factors)
            peak = step_bytes(steps[provider], self.options.device) / 2**20
            self._result(name, mode, provider, "peak_mib", [peak])
            if self.options.resident and self.options.device == "cpu":
                resident = resident_mib(name, provider, mode, torch.get_num_threads())
                self._result(name, mode, provider, "rss_mib", [resident])

    def _result(
        self, name: str, mode: str, provider: str, metric: str, values: list[float], note: str = ""
    ) -> None:
        shape = SHAPES[name]
        dtype = str(shape.dtype)[6:]
        self._add("align", name, dtype, provider, mode, metric, shape.visual, values, note)

    def _add(
        self,
        kernel: str,
        shape: str,
        dtype: str,
        provider: str,
        mode: str,
        metric: str,
        x: int,
        values: list[float],
        note: str = "",
    ) -> None:
        p20, p50, p80 = spread(values)
        self.outcome.rows.append(
            Row(
                *(kernel, shape, dtype, provider, mode, metric, x, p20, p50, p80, len(values)),
                *(self._device, self._version, note),
            )
        )


def run(options: Options, say: Callable[[str], None]) -> Outcome:
    """Measure; ``say`` gets a line of progress now and then."""
    return Bench(options, say).run()


def text(rows: list[Row]) -> str:
    """The rows as aligned lines."""
    return "\n".join(
        f"{row.shape:24} {row.mode:11} {row.provider:28} {row.metric:34} "
        + (f"{row.p50:10.3f}  [{row.p20:.3f}, {row.p80:.3f}]" if not row.note else row.note)
        for row in rows
    )


def main() -> int:
    """The command line; returns the exit code."""
    default = Options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = {*MODES["fwd+bwd"].providers, *MODES["pooled fwd"].providers}
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--providers", nargs="+", default=[], choices=sorted(names))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--limit-gib", type=float, default=default.limit_gib)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-rss", action="store_true", help="leave out the resident set")
    parser.add_argument("--out", type=Path, default=Path("out/alignment.csv"))
    given = parser.parse_args()
    if lack := missing(given.device):
        parser.error(f"argument --device: is {given.device!r}; {lack}")
    options = Options(
        shapes=tuple(given.shapes),
        providers=tuple(given.providers),
        modes=tuple(given.modes),
        rounds=given.rounds,
        seconds=given.seconds,
        limit_gib=given.limit_gib,
        device=given.device,
        resident=not given.no_rss,
    )
    outcome = run(options, lambda line: print(line, file=sys.stderr, flush=True))
    write(given.out, outcome.rows)
    print(text(outcome.rows))
    for shape, provider, why in outcome.red:
        print(f"RED: {shape} {provider}: {why}; no figure", file=sys.stderr)
    return 1 if outcome.red else 0


if __name__ == "__main__":
    sys.exit(main())
