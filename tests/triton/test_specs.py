"""inner/check_specs.py, interpreted here and compiled on a GPU."""

from __future__ import annotations

import pytest

from .process import run_inner

pytest.importorskip("triton")


def test_interpreted() -> None:
    assert run_inner("check_specs", "not slow", interpret=True) > 0


@pytest.mark.gpu
def test_on_the_device() -> None:
    assert run_inner("check_specs", "not slow or slow", interpret=False) > 0


@pytest.mark.slow
def test_every_spec_interpreted() -> None:
    assert run_inner("check_specs", "slow", interpret=True) > 300
