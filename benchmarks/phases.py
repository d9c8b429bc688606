"""Where the CPU kernels' time goes: `python -m benchmarks.phases [SHAPE ...]`.

One forward and backward of a shape, phase by phase (csrc/align.h): median milliseconds. Beside the kernels'
two phases stands what their products and exponentials would take at the rates that torch reaches in this
process. On a CPU both run on the same vector units: kernels come close to the sum, not to the larger one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from fastalign import ops
from fastalign.backends import cpu

from . import ceilings
from .case import Case
from .providers import PROVIDERS
from .shapes import REQUIRED, SHAPES, Shape

Times = dict[str, float]  # milliseconds of one step


class Watch:
    """Adds up the time that functions take, by a name, until it is read."""

    def __init__(self) -> None:
        self._times: dict[str, float] = defaultdict(float)

    def run(self, name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls the function."""
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            self._times[name] += 1e3 * (time.perf_counter() - start)

    def read(self) -> Times:
        """What was added up; begins anew."""
        out = dict(self._times)
        self._times.clear()
        return out


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """The kernels' phases, and the scaling of kept gradients, under a watch."""
    phases = {"select rows and keys": "__init__", "maps": "maps", "gradients": "gradients"}
    with ExitStack() as stack:
        for name, method in phases.items():
            original = getattr(cpu._Session, method)

            def timed(session: Any, *rest: Any, name: str = name, call: Any = original) -> Any:
                return watch.run(name, call, session, *rest)

            stack.enter_context(mock.patch.object(cpu._Session, method, timed))
        scale = partial(watch.run, "scale gradients", ops._scale)
        stack.enter_context(mock.patch.object(ops, "_scale", scale))
        yield


def phases(shape: Shape, repeats: int) -> Times:
    """Median times of one step by phase, "whole" the step itself."""
    step, watch = PROVIDERS["cpu"](Case.of(shape)), Watch()
    step()
    rounds = []
    with watched(watch):
        for _ in range(repeats):
            watch.run("whole", step)
            rounds.append(watch.read())
    return {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}


def table(shape: Shape, times: Times, rates: ceilings.Ceilings) -> Table:
    """The phases, what is left to Python and torch, and the floors."""
    out = Table(title=shape.describe(), title_justify="left", pad_edge=False, min_width=78)
    out.add_column("phase")
    for name in ("ms", "products", "exponentials"):
        out.add_column(name, justify="right")
    forward = [1e3 * x for x in rates.floor_seconds(shape, "fwd")]
    both = [1e3 * x for x in rates.floor_seconds(shape, "fwd+bwd")]
    floors = {"maps": forward, "gradients": [both[0] - forward[0]], "whole": both}
    inside = {name: took for name, took in times.items() if name != "whole"}
    rest = times["whole"] - sum(inside.values())
    for name, took in {**inside, "Python and torch": rest, "whole": times["whole"]}.items():
        floor = [f"{x:.2f}" for x in floors.get(name, [])]
        out.add_row(name, f"{took:.2f}", *floor, end_section=name == "Python and torch")
    return out


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "shapes", nargs="*", help=f"of {', '.join(SHAPES)}; default: {', '.join(REQUIRED)}"
    )
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"shapes are {', '.join(unknown)}; allowed: {', '.join(SHAPES)}")
    rates = ceilings.measure()
    console = Console(highlight=False)
    console.print(
        f"{torch.get_num_threads()} threads, kernels for {cpu.load_library().fa_isa().decode()}"
    )
    for name in options.shapes or REQUIRED:
        console.print(table(SHAPES[name], phases(SHAPES[name], options.repeats), rates))


if __name__ == "__main__":
    main()
