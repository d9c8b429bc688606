"""inner/check_calls.py, interpreted here and compiled on a GPU."""

from __future__ import annotations

import pytest

from .process import run_inner

pytest.importorskip("triton")


def test_interpreted() -> None:
    """40 examples."""
    assert run_inner("check_calls", "not slow", interpret=True) == 1


@pytest.mark.gpu
def test_on_the_device() -> None:
    assert run_inner("check_calls", "not slow or slow", interpret=False) == 9


@pytest.mark.slow
def test_many_more_interpreted() -> None:
    """320 examples, minutes."""
    assert run_inner("check_calls", "slow", interpret=True) == 8
