"""inner/check_calls.py, interpreted here and compiled on a GPU."""

from __future__ import annotations

import pytest

from .process import run_inner

pytest.importorskip("triton")


@pytest.mark.slow  # minutes: an interpreted program costs a millisecond
def test_interpreted() -> None:
    assert run_inner("check_calls", "not slow", interpret=True) > 0


@pytest.mark.gpu
def test_on_the_device() -> None:
    assert run_inner("check_calls", "not slow or slow", interpret=False) > 0


@pytest.mark.slow
def test_many_more_interpreted() -> None:
    assert run_inner("check_calls", "slow", interpret=True) > 0
