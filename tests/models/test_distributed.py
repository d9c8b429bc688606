"""DDP and FSDP2 with two gloo processes, layers checkpointed: gradients equal those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "kind", ["ddp", "fsdp", pytest.param("fsdp-compiled", marks=pytest.mark.slow)]
)
def test_two_processes(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.distributed", kind]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    line = next(x for x in results[0][0].splitlines() if x.startswith("relative error"))
    assert float(line.split()[-1]) < 1e-5
