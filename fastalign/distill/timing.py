"""Where a run's time goes: seconds of each part of the step, tokens a second, peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

#: The parts, in the order of a step. ``backward`` holds the transfer of the batch, too; ``losses`` is
#: all that is made of hidden states and logits; ``rest`` is logging, the schedule and callbacks.
PARTS = (
    "data",
    "teacher",
    "student",
    "alignment",
    "losses",
    "backward",
    "optimizer",
    "checkpoint",
    "rest",
)
#: Device events that may wait to be read; reading them waits for the device.
MOST_PENDING = 4096


class Stopwatch:
    """Charges every moment between ``start`` and ``stop`` to one part.

    On a CPU both wall time and CPU time (of all threads) are kept: shares are those of CPU time, which a
    machine shared with others distorts least. On a GPU the clock is that of the stream: events are
    recorded and read later, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.cpu_seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.batches = 0
        self.tokens = 0
        self._part: str | None = None
        self._last: tuple[float, float] = (0.0, 0.0)
        self._pending: list[tuple[str | None, Any]] = []

    # ------------------------------------------------------------------------ the clock

    def start(self) -> None:
        """From now on time is counted, as ``rest``."""
        self._part = None
        self.switch("rest")

    def stop(self) -> None:
        self.switch(None)
        self._read_events()

    def switch(self, part: str | None) -> str | None:
        """What the time from now on is charged to; returns what it was charged to."""
        before = self._part
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._pending.append((part, event))
            if len(self._pending) > MOST_PENDING:
                self._read_events()
        now = (time.perf_counter(), time.process_time())
        if before is not None:
            self.cpu_seconds[before] += now[1] - self._last[1]
            if self.device.type != "cuda":
                self.seconds[before] += now[0] - self._last[0]
        self._last, self._part = now, part
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside is that of ``name``, and not of what is around it; idle when not started."""
        if self._part is None:
            yield
            return
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def batch(self, batch: Mapping[str, Any]) -> None:
        """Count a micro-batch of this process."""
        self.tokens += int(batch["input_ids"].numel())
        self.batches += 1

    def _read_events(self) -> None:
        if not self._pending:
            return
        self._pending[-1][1].synchronize()
        for (part, event), (_, after) in zip(self._pending, self._pending[1:], strict=False):
            if part is not None:
                self.seconds[part] += event.elapsed_time(after) / 1000
        self._pending = self._pending[-1:]

    # ---------------------------------------------------------------------- the summary

    @property
    def total(self) -> float:
        """Seconds between ``start`` and ``stop``."""
        return sum(self.seconds.values())

    def summary(self) -> dict[str, Any]:
        """Plain numbers; memory of the device, or the process's largest resident set on a CPU.

        ``alignment_share``: the alignment's time over that of all else in the step (data, checkpoints
        and ``rest`` are no part of the step). It is 0.05 where alignment makes a step 5 % longer.
        """
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device))
        else:
            peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
        used = {name: value for name, value in self.seconds.items() if value > 0}
        shares = self.seconds if self.device.type == "cuda" else self.cpu_seconds
        outside = ("data", "checkpoint", "rest", "alignment")
        others = sum(value for name, value in shares.items() if name not in outside)
        return {
            "seconds": self.total,
            "seconds_by_part": used,
            "cpu_seconds_by_part": {name: self.cpu_seconds[name] for name in used},
            "timed_steps": self.steps,
            "batches": self.batches,
            "tokens_per_second": self.tokens / max(1e-9, self.total),
            "alignment_share": shares["alignment"] / others if others else 0.0,
            "peak_bytes": peak,
            "peak_is": "device memory" if self.device.type == "cuda" else "resident set",
        }
