"""inner/check_memory.py, interpreted here and compiled on a GPU."""

from __future__ import annotations

import pytest

from .process import run_inner

pytest.importorskip("triton")


def test_interpreted() -> None:
    assert run_inner("check_memory", "not slow", interpret=True) > 0


@pytest.mark.gpu
def test_on_the_device() -> None:
    assert run_inner("check_memory", "not slow", interpret=False) > 0
