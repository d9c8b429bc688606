"""Peak bytes of tensors, from torch's own allocation records: what RSS blurs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` had allocated at once, beyond what was there before.

    torch's profiler records every allocation and release of its CPU allocator, inside operators too.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    assert profiler.profiler is not None
    records = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in records), initial=0))
