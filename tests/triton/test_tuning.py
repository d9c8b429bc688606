"""Autotuning as far as no device is needed: who is a candidate, and that nothing happens unasked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import fastalign.kernels.launch as launching
from fastalign.kernels import (
    dk,
    dq,
    head_kl,
    map_gradient,
    pooled,
    row_delta,
    row_lse,
    row_sums,
    statistics,
    tuning,
)
from fastalign.kernels.configs import GRAIN, Tile

TILE = Tile(64, 64, 8, 2, "for a test")
KERNELS = [
    *(dk._dk, dq._dq, head_kl._head_kl, map_gradient._map_gradient, pooled._pooled_sums),
    *(row_delta._row_delta, row_lse._row_lse, row_sums._row_sums, statistics._statistics),
]


def _fields(tile: Tile) -> tuple[int, ...]:
    return tile.rows, tile.keys, tile.warps, tile.stages


def test_candidates_are_one_step_away() -> None:
    first, *others = tuning.candidates(TILE)
    assert first is TILE
    assert len(others) == len({_fields(t) for t in others}) == 7
    for tile in others:
        changed = [a != b for a, b in zip(_fields(tile), _fields(TILE), strict=True)]
        assert sum(changed) == 1
        assert GRAIN % tile.rows == GRAIN % tile.keys == 0
        assert tile.warps in (4, 8)
        assert 1 <= tile.stages <= 3


def test_candidates_stay_within_what_kernels_take() -> None:
    sizes = {_fields(t) for t in tuning.candidates(Tile(16, 128, 4, 1, "a corner", turned=True))}
    assert sizes == {
        (16, 128, 4, 1),
        (32, 128, 4, 1),
        (16, 64, 4, 1),
        (16, 128, 8, 1),
        (16, 128, 4, 2),
    }
    assert all(t.turned for t in tuning.candidates(Tile(16, 128, 4, 1, "a corner", turned=True)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: str(k.__name__))
def test_every_kernel_can_be_tuned(kernel: Any) -> None:
    """triton accepts the choice: its key names arguments of the kernel, the tile's size is left open."""
    restore = ("p_out",) if kernel is dk._dk else ()
    chosen = tuning.tuned(kernel, TILE, restore)
    assert len(chosen.configs) == 8
    assert chosen.cache_results
    assert "INTERVAL" in chosen.keys
    assert not {"BR", "BC"} & set(chosen.keys)
    assert chosen.restore_value == list(restore)
    assert tuning.tuned(kernel, TILE, restore) is chosen


class _Kernel:
    """Notes how it is launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **keywords: self.calls.append((grid, keywords))


@pytest.mark.parametrize("value", [None, "", "0"])
def test_unasked_the_table_decides(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(tuning.VARIABLE, value)
    monkeypatch.setattr(tuning, "tuned", lambda *_: pytest.fail("tuned without being asked"))
    kernel = _Kernel()
    launching.launch(kernel, lambda rows, keys: (rows, keys), {"x": 1}, TILE)
    facts = {"x": 1, "BR": 64, "BC": 64, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    assert kernel.calls == [((64, 64), facts)]


def test_a_cap_on_registers_reaches_the_launch_and_the_tuner() -> None:
    """maxnreg, and nothing where the table has no number: not every backend knows the word."""
    capped = replace(TILE, registers=255)
    kernel = _Kernel()
    launching.launch(kernel, lambda rows, keys: (rows, keys), {}, capped)
    launching.launch(kernel, lambda rows, keys: (rows, keys), {}, TILE)
    (_, first), (_, second) = kernel.calls
    assert first == {**second, "maxnreg": 255}
    configs = tuning.tuned(dk._dk, capped, ()).configs
    assert all(config.maxnreg == 255 for config in configs)
    assert all("maxnreg" not in c.all_kwargs() for c in tuning.tuned(dk._dk, TILE, ()).configs)


def test_asked_the_tuner_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(launching, "interpreting", lambda: False)
    kernel, tuner = _Kernel(), _Kernel()
    asked = []
    monkeypatch.setattr(tuning, "tuned", lambda *which: asked.append(which) or tuner)
    launching.launch(kernel, lambda rows, keys: (rows, keys), {"x": 1}, TILE, restore=("x",))
    assert asked == [(kernel, TILE, ("x",))]
    assert kernel.calls == []
    ((grid, facts),) = tuner.calls
    assert facts == {"x": 1, "enable_fp_fusion": True}  # size, warps and stages are the tuner's
    assert grid({"BR": 32, "BC": 128}) == (32, 128)


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"FASTALIGN_AUTOTUNE is 'yes': 1 .*, or 0"):
        tuning.wanted()
