"""The compiled library itself: what it says when it cannot serve, and its conversion of gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign.backends import cpu

_CALL = """
import torch, fastalign
q, k = torch.rand(1, 2, 3, 8), torch.rand(1, 2, 5, 8)
where = dict(query_positions=torch.tensor([[2, 3, 4]]), visual_mask=torch.tensor([[1, 1, 1, 0, 0]]).bool())
print(float(fastalign.fused_attn_align_loss(q, k, q, k, backend={backend!r}, **where)))
"""


def _call(backend: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _CALL.format(backend=backend)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_an_instruction_set_that_is_not_there_is_an_error() -> None:
    done = _call("cpu", FASTALIGN_ISA="avx1024")
    assert done.returncode == 1
    assert "FASTALIGN_ISA is 'avx1024'" in done.stderr and "avx512_bf16" in done.stderr


def test_under_auto_it_is_said_and_tiled_serves() -> None:
    done = _call("auto", FASTALIGN_ISA="avx1024")
    assert done.returncode == 0, done.stderr
    assert "FASTALIGN_ISA is 'avx1024'" in done.stderr


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu._build, "find", lambda: broken)
    cpu.load_library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"cannot be loaded.*reinstall"):
            cpu.load_library()
    finally:
        cpu.load_library.cache_clear()


def test_gradients_become_bfloat16_as_torch_rounds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70_001, generator=generator) * 10.0 ** torch.arange(70_001).remainder(40).sub(
        20
    )
    x[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.00390625, 1.01171875])
    for factor in (1.0, -0.37, 1e-30):
        given = torch.tensor(factor)
        expected = (x * given).to(torch.bfloat16)
        assert torch.equal(
            cpu.scaled(x, given, torch.bfloat16).view(torch.int16)[1:],
            expected.view(torch.int16)[1:],
        )
        assert cpu.scaled(x, given, torch.bfloat16)[0].isnan()
