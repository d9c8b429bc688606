"""Runs the kernels' own tests in a process with (or without) the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_QUIET = [
    "-W", "ignore::RuntimeWarning",  # numpy's, where the interpreter takes log2 of 0 or overflows
    "-W", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning",
    "-W", "ignore::hypothesis.errors.HypothesisWarning",  # a long repr of a failing call
]  # fmt: skip


def run_inner(name: str, select: str, interpret: bool) -> int:
    """Run ``inner/<name>.py``; returns how many tests passed.

    Raises:
        AssertionError: one of them failed, with their output.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select),
        *_QUIET,
        str(HERE / "inner" / f"{name}.py"),
    ]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found.group(1)) if found else 0
