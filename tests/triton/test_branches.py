"""Tiles of further branches: which a call gets; on three architectures, that the worst of them hold."""

from __future__ import annotations

import os
from itertools import permutations

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from fastalign.kernels import branches
from fastalign.kernels.branches import (
    GIVEN,
    MIX,
    SCATTERED,
    SINK_FILTER,
    SOFTCAP,
    WIDE,
    branch_tile,
)

from benchmarks.static import report
from benchmarks.static.record import Launch

KERNELS = {"row_lse", "statistics", "map_gradient", "row_delta", "dq", "dk"}


def _rows_and_keys(kernel: str, variant: str, target: str, *named: str) -> tuple[int, int] | None:
    tile = branch_tile(kernel, variant, target, 128, 2, named)
    return None if tile is None else (tile.rows, tile.keys)


def test_the_first_row_that_fits_is_taken() -> None:
    assert _rows_and_keys("statistics", "", "sm_80", GIVEN, WIDE) == (128, 32)
    assert _rows_and_keys("statistics", "", "sm_80", SOFTCAP, WIDE) == (64, 64)
    assert _rows_and_keys("statistics", "", "sm_80", WIDE) == (128, 64)
    assert _rows_and_keys("statistics", "", "sm_80", SOFTCAP) is None
    assert _rows_and_keys("dk", "scores", "sm_80", MIX) == (64, 64)
    # narrow heads have rows of their own, before the others
    assert branch_tile("dk", "", "sm_80", 64, 2, (MIX,)) is not branch_tile(
        "dk", "", "sm_80", 128, 2, (MIX,)
    )
    assert branch_tile("dk", "", "sm_90", 64, 2, (MIX,)) is branch_tile(
        "dk", "", "sm_90", 128, 2, (MIX,)
    )
    # maps in logs have rows of their own or none
    assert _rows_and_keys("dq", "logs", "sm_89", SCATTERED) == (64, 32)
    assert _rows_and_keys("dq", "", "sm_89", SCATTERED) is None
    assert _rows_and_keys("statistics", "logs", "sm_80", GIVEN, WIDE) is None


def test_no_branch_no_row() -> None:
    for target in branches._TABLES:
        for kernel in KERNELS:
            assert branch_tile(kernel, "", target, 128, 2, ()) is None
    assert branch_tile("dk", "", "sm_80", 128, 4, (MIX,)) is None  # fp32
    assert branch_tile("dk", "", "sm_80", 256, 2, (MIX,)) is None
    assert branch_tile("dk", "", "interpreter", 128, 2, (MIX,)) is None


def test_every_row_is_taken_by_some_call() -> None:
    """A row behind others that fit whatever it fits would never be."""
    names = (SOFTCAP, SINK_FILTER, GIVEN, MIX, WIDE, SCATTERED)
    calls = [(x,) for x in names] + list(permutations(names, 2))
    rows = [
        (size, target, *row)
        for size, tables in ((64, branches._NARROW_TABLES), (128, branches._TABLES))
        for target, table in tables.items()
        for row in table.items()
    ]
    for size, target, (name, branch), tile in rows:
        kernel, variant = name.removesuffix("_logs"), "logs" if name.endswith("_logs") else ""
        assert kernel in KERNELS
        taken = [branch_tile(kernel, variant, target, size, 2, call) for call in calls]
        assert any(tile is one for one in taken), (size, target, name, branch)


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def recorded(request: pytest.FixtureRequest) -> tuple[str, list[tuple[str, Launch]]]:
    """(target, its launches): once a module, before a test's fixtures fill what torch.empty reserves."""
    return request.param, list(report.launches(request.param, 128, "bf16", variants=True))


@pytest.mark.parametrize(
    ("objective", "kernels"),
    [("several, given map", {"statistics"}), ("several, mix", {"map_gradient", "dq", "dk"})],
)
def test_the_worst_branches_hold(
    objective: str, kernels: set[str], recorded: tuple[str, list[tuple[str, Launch]]]
) -> None:
    """All gates of launches whose objective's own tile spills in this branch, on one of the targets."""
    target, launches = recorded
    found = [
        report.row_of(objective, launch, report.TARGETS[target], 128, "bf16")
        for name, launch in launches
        if name == objective and launch.name in kernels
    ]
    assert {row.kernel.split(" (")[0] for row in found} == kernels
    assert report.failures(found) == []
