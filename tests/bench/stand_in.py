"""A GPU run of the suite without a GPU: `TRITON_INTERPRET=1 python -m tests.bench.stand_in ARGUMENTS`.

The command is the suite's own, with ``--device cuda``. Tensors of "cuda" lie on the CPU, and torch.cuda's
events, memory and properties are stand-ins that refuse what torch refuses. Shape and ceilings are small.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

#: What every step is said to allocate at its peak.
PEAK = 3 * 2**20


class OnCpu(TorchFunctionMode):
    """Everything that is asked for on "cuda" comes on the CPU; counts what is asked for."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function with other devices."""
        OnCpu.calls += 1
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


class Event:
    """As torch.cuda.Event: says how far apart two are once both were recorded and waited for."""

    waiting: list[Event] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.at, self.done = enable_timing, 0.0, False

    def record(self) -> None:
        """Into the stream."""
        self.at, self.done = time.perf_counter(), False
        Event.waiting.append(self)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self.timing and end.timing and self.done and end.done):
            raise RuntimeError("an event without timing, not recorded or not completed")
        return 1e3 * (end.at - self.at)


def synchronize() -> None:
    """All that was recorded is done."""
    for event in Event.waiting:
        event.done = True
    Event.waiting.clear()


class Memory:
    """A step's peak is seen only between the reset before it and the reading behind it."""

    HELD = 5 * 2**20

    def __init__(self) -> None:
        self.since: int | None = None

    def reset(self) -> None:
        """From here on."""
        self.since = OnCpu.calls

    def peak(self) -> int:
        """What was held, and more if something ran since the reset."""
        assert self.since is not None
        return self.HELD + (PEAK if OnCpu.calls > self.since else 0)


def install() -> None:
    """Put the stand-ins into torch.cuda."""
    memory = Memory()
    for name, value in {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "Event": Event,
        "synchronize": synchronize,
        "get_device_name": lambda: "Stand-in",
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=1),
        "reset_peak_memory_stats": memory.reset,
        "memory_allocated": lambda: Memory.HELD,
        "max_memory_allocated": memory.peak,
    }.items():
        setattr(torch.cuda, name, value)


def main() -> int:
    """The suite's command on the stand-in."""
    from benchmarks import alignment, ceilings, exponentials, rehearsal

    install()
    small = rehearsal.SHAPES[2]
    alignment.SHAPES["small-gpu"] = small
    ceilings.PRODUCTS["cuda"] = ((64, 64, 64),)
    exponentials.TURNS, exponentials.PROGRAMS = 3, 2
    with OnCpu():
        work, run = exponentials.exponentials("cuda")
        got, want = run(), torch.arange(1024) / 1024
        for _ in range(3):
            want = torch.exp2(-want)
        assert work == 2 * 1024 * 3
        torch.testing.assert_close(got, want.expand(2, -1))
        sys.argv[1:] = ["--device", "cuda", "--shapes", "small-gpu", *sys.argv[1:]]
        return alignment.main()


if __name__ == "__main__":
    sys.exit(main())
