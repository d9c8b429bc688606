"""The tables of tiles, looked up as launches do: every row can be launched, and none hides what it is."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from fastalign.kernels.configs import GRAIN, Tile, tile_for

from benchmarks.static.report import HEAD_DIMS, TARGETS, launches, row_of

KERNELS = (
    *("row_sums", "row_lse", "row_delta", "statistics", "map_gradient", "pooled_sums"),
    *("dq", "dk", "head_kl"),
)


def _tiles(target: str) -> list[tuple[int, int, Tile]]:
    """(head_dim, bytes of an element, tile) of every kernel, variant and kind of heads."""
    asked = itertools.product(KERNELS, ("", "logs", "scores"), HEAD_DIMS, (2, 4), (False, True))
    return [(d, n, tile_for(k, v, target, d, n, each)) for k, v, d, n, each in asked]


@pytest.mark.parametrize("target", TARGETS)
def test_a_tile_fits_lists_and_register_file(target: str) -> None:
    for _, _, tile in _tiles(target):
        assert GRAIN % tile.rows == GRAIN % tile.keys == 0
        assert tile.why
        if tile.registers is not None:
            assert TARGETS[target].backend == "cuda"  # AMD's compiler knows no maxnreg
            assert -(-tile.registers // 8) * 8 * 32 * tile.warps <= TARGETS[target].registers


@pytest.mark.parametrize("target", TARGETS)
def test_mma_sync_instead_of_better_is_for_wide_fp32_alone(target: str) -> None:
    fallback = {(d, n) for d, n, tile in _tiles(target) if tile.mma_sync}
    assert fallback == ({(256, 4)} if target in ("sm_90", "sm_100") else set())


def test_what_has_no_table_still_gets_a_tile() -> None:
    for itemsize, size in itertools.product((2, 4), HEAD_DIMS):
        assert tile_for("dq", "", "xpu", size, itemsize).registers is None
        assert tile_for("dq", "", "sm_99", size, itemsize).mma_sync is False


@pytest.mark.parametrize("size", HEAD_DIMS)
def test_products_by_fma_take_the_same_tiles_on_every_nvidia(size: int) -> None:
    """No matrix unit, so that its architecture says nothing; and no 64 rows, which FMA cannot hold."""
    for kernel, target in itertools.product(KERNELS, ("sm_90", "sm_100", "sm_120", "sm_99")):
        tile = tile_for(kernel, "", target, size, 4, by_fma=True)
        assert max(tile.rows, tile.keys) <= 32
        assert tile == tile_for(kernel, "", "sm_80", size, 4, by_fma=True)


@pytest.mark.parametrize(
    ("target", "dtype", "fma", "unit"),
    [
        ("sm_90", "fp32", True, False),
        ("sm_90", "tf32", False, True),
        ("gfx942", "fp32", False, True),
        ("gfx950", "fp32", False, True),
    ],
)
def test_where_fp32_products_are_taken(target: str, dtype: str, fma: bool, unit: bool) -> None:
    """fp32 as torch has it: FMA on NVIDIA, no tf32 behind one's back; matrix unit on AMD, tf32 there."""
    _, launch = next(
        x for x in launches(target, 64, dtype, variants=False) if x[1].name == "head_kl"
    )
    assert launch.arguments["AGAIN"] is fma
    row = row_of("head kl", launch, TARGETS[target], 64, dtype)
    assert row.problems == ()
    assert (row.tensor_core_ops > 0) is unit


def test_the_gate_asks_for_the_instruction_that_the_tile_was_made_for() -> None:
    """dk of the other keys, tf32 at head_dim 256: mma.sync on sm_90, which is no wgmma."""
    _, launch = next(
        (objective, x)
        for objective, x in launches("sm_90", 256, "tf32", variants=False)
        if x.name == "dk" and not x.arguments["INSIDE"]
    )
    assert launch.tile.mma_sync
    row = row_of("head mean", launch, TARGETS["sm_90"], 256, "tf32")
    assert row.problems == ()
    assert row.config.endswith("mma.sync")
    assert row.tensor_core_ops > 0
    claimed = replace(launch, tile=replace(launch.tile, mma_sync=False))
    (problem,) = row_of("head mean", claimed, TARGETS["sm_90"], 256, "tf32").problems
    assert problem.startswith("0 HGMMA for ")
