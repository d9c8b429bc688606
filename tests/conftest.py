"""Shared by every test: uninitialised memory is poison, and randomness is fixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# torch's caches on disk know a compiled operator by its name, not by its schema or derivative: after a
# change of either they would give the old code back.
_OPERATORS = ("ops.py", "models/links.py")
_SOURCES = b"".join(
    (Path(__file__).parents[1] / "fastalign" / name).read_bytes() for name in _OPERATORS
)
torch.compiler.config.cache_key_tag = hashlib.sha256(_SOURCES).hexdigest()

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the ``gpu`` mark are skipped where there is none."""
    if torch.cuda.is_available() or torch.xpu.is_available():  # ROCm answers as CUDA
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA, ROCm or XPU device"))


@pytest.fixture(autouse=True)
def fixed_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that an unwritten output shows itself."""

    def poison(make):  # type: ignore[no-untyped-def]
        def filled(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
