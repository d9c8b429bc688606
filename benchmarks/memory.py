"""Peak memory of a step: tensors and the kernels' workspace, and the process's resident set.

``python -m benchmarks.memory SHAPE PROVIDER`` is the fresh process in which the resident set is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that ``run`` had allocated at once, beyond what was there before.

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
    return int(max(accumulate((event.nbytes() for event in records), initial=0)))


def step_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak of a step's tensors, on its device, plus the workspace of the C++ kernels."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return sum(step_parts(run))


def step_parts(run: Callable[[], object]) -> tuple[int, int]:
    """On a CPU: the peak of a step's tensors, and that of the C++ kernels' workspace."""
    _workspace()
    tensors = peak_bytes(run)
    return tensors, _workspace()


def _workspace() -> int:
    """Peak of the kernels' own memory since the last call; 0 where they have not been loaded."""
    module = sys.modules.get("fastalign.backends.cpu")
    if module is None or not module.load_library.cache_info().currsize:
        return 0
    peak: int = module.peak_workspace()
    return peak


# ------------------------------------------------------------------- the resident set


def resident_mib(shape: str, provider: str, mode: str, threads: int) -> float:
    """Peak resident set of one step beyond what its process holds between steps, in MiB.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", shape, provider, "--mode", mode,
         "--threads", str(threads)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{provider} on {shape}: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at its peak during a second run of ``run``.

    The first run compiles, fills pools and touches code. Linux keeps a high-water mark that can be set
    back (``/proc/self/clear_refs``); ``getrusage`` cannot, and a child even inherits its parent's
    (``execve`` keeps the larger one), so it serves only elsewhere.
    """
    run()
    gc.collect()
    _workspace()  # lets go what the kernels keep
    with contextlib.suppress(AttributeError, OSError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS") or _ru_maxrss()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _ru_maxrss()
        run()
        return _ru_maxrss() - before
    run()
    return (_status("VmHWM") or 0) - before


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(name)), None)


def _ru_maxrss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Print the peak resident set of one step, in MiB."""
    from .case import Case
    from .modes import MODES
    from .shapes import SHAPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("provider")
    parser.add_argument("--mode", choices=list(MODES), default="fwd+bwd")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step = MODES[options.mode].providers[options.provider](Case.of(SHAPES[options.shape]))
    print(f"{resident_peak(step) / 2**20:.1f}")


if __name__ == "__main__":
    main()
