"""Tiles of branches that keep more in registers than the objectives that ``configs`` was made for.

A branch is something that a call has beside its objective: SOFTCAP, a SINK_FILTER, a GIVEN map, a learned
MIX, WIDE offsets, or SCATTERED visibility (segments or blocks interleaved, so that masks compare tokens and
not places in a list). SEVERAL stands for two of them or more, ANY for one or more. The tables are for half
precision and head sizes up to 128; those of narrow heads, up to 64, come first. What a row replaces spills
at head_dim 128 (narrow: 64) in bf16; the row does not (``benchmarks.static.report``: each branch by itself,
and several at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from .configs import Tile

SOFTCAP, SINK_FILTER, GIVEN = "softcap", "sink filter", "given map"
MIX, WIDE, SCATTERED = "mix", "64-bit offsets", "scattered"
SEVERAL, ANY = "several", "any"

#: (kernel, or kernel_logs where maps are in logs; branch) -> tile. The first row that fits a call is taken.
_Table = dict[tuple[str, str], Tile]
_SM_80: _Table = {
    ("statistics", GIVEN): Tile(128, 32, 8, 2, "64x128 spills beside other branches"),
    ("statistics", SEVERAL): Tile(64, 64, 8, 2, "64x128 and 128x64 spill"),
    ("statistics", WIDE): Tile(128, 64, 8, 1, "with two stages it spills"),
    ("map_gradient", SEVERAL): Tile(64, 64, 8, 2, "128x64 spills"),
    ("row_lse", SEVERAL): Tile(128, 64, 8, 2, "with 4 warps it spills"),
    ("dq", SEVERAL): Tile(64, 64, 8, 2, "64x32 with 4 warps spills"),
    ("dk", MIX): Tile(64, 64, 8, 2, "32x64 with 4 warps spills, 64x64 with one stage, too"),
}
_SM_8X: _Table = {
    ("statistics", SEVERAL): Tile(64, 32, 8, 2, "64x64 spills with a given map"),
    ("statistics", SINK_FILTER): Tile(64, 64, 8, 1, "with two stages it spills"),
    ("dq_logs", SCATTERED): Tile(64, 32, 8, 2, "64x64, and 4 warps, spill"),
}
_SM_90: _Table = {
    ("statistics", GIVEN): Tile(64, 128, 8, 2, "128x64 spills"),
    ("dk", SEVERAL): Tile(128, 32, 8, 1, "128x64 and 64x64 spill with a mix"),
    ("dk", MIX): Tile(128, 64, 8, 1, "with two stages it spills"),
    ("dk", SCATTERED): Tile(128, 64, 8, 1, "with two stages it spills"),
    ("dk", SOFTCAP): Tile(128, 64, 8, 1, "with two stages it spills"),
    ("dk_logs", SEVERAL): Tile(64, 64, 8, 1, "128x64 spills"),
    ("dk_logs", SCATTERED): Tile(64, 64, 8, 2, "128x64 spills"),
}
_SM_100: _Table = {
    ("statistics", SCATTERED): Tile(64, 128, 8, 1, "with two stages it spills, 128x64, too"),
    ("statistics", SOFTCAP): Tile(64, 128, 8, 1, "with two stages it spills, 128x64, too"),
    ("statistics", SINK_FILTER): Tile(64, 128, 8, 1, "with two stages the pass of moments spills"),
    ("statistics", ANY): Tile(64, 128, 8, 2, "128x64 spills"),
    ("map_gradient", WIDE): Tile(64, 128, 8, 1, "with two stages it spills"),
    ("map_gradient", SOFTCAP): Tile(64, 128, 8, 1, "with two stages it spills"),
    ("map_gradient", MIX): Tile(64, 128, 8, 1, "with two stages it spills"),
    ("dq", SCATTERED): Tile(128, 64, 8, 2, "with 4 warps it spills"),
    ("dk", MIX): Tile(32, 64, 4, 2, "32x128 spills beside other branches", turned=True),
}
_SM_120: _Table = {
    ("statistics", GIVEN): Tile(64, 128, 8, 2, "64x64 spills beside other branches"),
    ("row_delta", ANY): Tile(128, 64, 8, 2, "64x64 spills with a mix and with 64-bit offsets"),
    ("dq_logs", SCATTERED): Tile(64, 32, 8, 2, "64x64, and 4 warps, spill"),
}
_CDNA: _Table = {
    ("statistics", SEVERAL): Tile(64, 64, 8, 1, "with two stages it spills"),
    ("statistics_logs", SCATTERED): Tile(64, 64, 8, 1, "with two stages it spills"),
    ("map_gradient", SEVERAL): Tile(64, 64, 8, 1, "with two stages it spills"),
    ("map_gradient_logs", SCATTERED): Tile(64, 64, 8, 1, "with two stages it spills"),
}
_TABLES: dict[str, _Table] = {
    "sm_80": _SM_80,
    "sm_86": _SM_8X,
    "sm_89": _SM_8X,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
_NARROW_TABLES: dict[str, _Table] = {
    "sm_80": {
        ("dk", MIX): Tile(64, 32, 8, 2, "64x64 spills beside other branches"),
        ("dk", SCATTERED): Tile(32, 64, 8, 2, "with 4 warps it spills"),
        ("dk_logs", SEVERAL): Tile(32, 32, 8, 1, "32x64 spills", registers=255),
    },
    "sm_90": {("statistics", GIVEN): Tile(64, 64, 8, 2, "64x128 spills")},
    "sm_100": {
        ("statistics", GIVEN): Tile(64, 64, 8, 1, "64x128 spills"),
        ("dk_logs", SCATTERED): Tile(32, 64, 8, 2, "32x128, and 4 warps, spill", turned=True),
    },
    "sm_120": {("statistics", GIVEN): Tile(64, 64, 8, 1, "64x128 spills")},
}


def branch_tile(
    kernel: str,
    variant: str,
    architecture: str,
    size: int,
    itemsize: int,
    branches: Sequence[str],
) -> Tile | None:
    """The tile of a kernel for a call with these branches; None: its objective's own (``tile_for``).

    Args:
        kernel, variant, architecture, size, itemsize: as ``configs.tile_for``.
        branches: names of this module, SEVERAL and ANY excluded.
    """
    if not branches or itemsize > 2 or size > 128:
        return None
    has = {*branches, ANY} | ({SEVERAL} if len(branches) > 1 else set())
    name = f"{kernel}_logs" if variant == "logs" else kernel
    tables = (_NARROW_TABLES, _TABLES) if size <= 64 else (_TABLES,)
    rows = chain.from_iterable(table.get(architecture, {}).items() for table in tables)
    return next((tile for (row, branch), tile in rows if row == name and branch in has), None)
