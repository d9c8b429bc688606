"""Where a run's time went: seconds a step, tokens a second, peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of forward and backward; the optimiser and the data are the rest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.batches = 0
        self.tokens = 0
        self.total_seconds = 0.0

    @contextmanager
    def step(self, batch: Mapping[str, Any]) -> Iterator[None]:
        self.tokens += int(batch["input_ids"].numel())
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.batches += 1

    def summary(self) -> dict[str, float]:
        """Plain numbers; memory of the device, or the process's largest resident set on a CPU."""
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device))
        else:
            peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
        return {
            "seconds": self.total_seconds,
            "seconds_forward_backward": self.seconds,
            "seconds_per_batch": self.seconds / max(1, self.batches),
            "tokens_per_second": self.tokens / max(1e-9, self.total_seconds),
            "peak_bytes": peak,
        }
