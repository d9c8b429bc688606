"""Which tile each kernel takes, by architecture and head size: tables, not a search at run time.

A row's ``why`` says what chose it. "static": the bound of ``benchmarks.static_report``; no timing on a
GPU is behind any of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows x keys of a program's tile, warps, pipeline stages, and the reason."""

    rows: int
    keys: int
    warps: int
    stages: int
    why: str


_INTERPRETER = Tile(16, 16, 4, 1, "small: several tiles at sizes that an interpreter can run")

# What the static report measured at head_dim 128 in bf16, without stack or spills (clocks per element).
_SM_80 = {
    "statistics": Tile(128, 64, 8, 2, "static 0.259, floor 0.25; 64x64 with 8 warps 0.263"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.257, floor 0.25; 64x64 with 8 warps 0.259"),
    "dq": Tile(64, 32, 4, 2, "static 0.269, floor 0.25; 128x64 with 8 warps 0.274"),
    "dk": Tile(32, 64, 4, 2, "static 0.255, floor 0.25; 64x64 with 8 warps 0.262, 64x128 spills"),
}
_SM_90 = {
    "row_lse": Tile(128, 64, 8, 2, "static 0.115, floor 0.0625; 64x64 with 4 warps 0.126"),
    "row_delta": Tile(128, 64, 8, 2, "static 0.129, floor 0.0625; 64x64 with 4 warps 0.141"),
    "statistics": Tile(128, 64, 8, 2, "static 0.134, floor 0.125; 64x64 with 4 warps 0.136"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.132, floor 0.125; 64x64 with 4 warps spills"),
    "dq": Tile(64, 64, 4, 2, "static 0.147, floor 0.125"),
    "dk": Tile(64, 64, 4, 2, "static 0.150, floor 0.125"),
    "dk_logs": Tile(128, 64, 8, 2, "static 0.194, floor 0.125; 64x64 is 0.180 but spills"),
}
_SM_100 = {
    "statistics": Tile(
        64, 128, 8, 1, "static 0.134, floor 0.125; with two stages 24 bytes of stack"
    ),
    "map_gradient": Tile(64, 128, 8, 2, "static 0.134, floor 0.125; 128x64 spills"),
    "dq": Tile(128, 64, 4, 2, "static 0.128, floor 0.0625; 8 warps 0.130"),
    "dk": Tile(32, 128, 8, 2, "static 0.162, floor 0.0625; 64x128 is 0.142 but spills"),
}
_TABLES = {"sm_80": _SM_80, "sm_90": _SM_90, "sm_100": _SM_100}
_OTHER = Tile(64, 64, 8, 2, "not tuned: no row of a table covers it")
_WIDE = Tile(
    32, 32, 4, 1, "not tuned: head sizes above 128, and fp32, whose tiles are twice as large"
)


def tile_for(kernel: str, architecture: str, size: int, itemsize: int) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: its name in the tables. architecture: as ``launch.architecture``.
        size: the larger head size of the two sides. itemsize: bytes of an element of q.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if size > 128 or itemsize > 2:
        return _WIDE
    table = _TABLES.get(architecture, {})
    return table.get(kernel) or table.get(kernel.removesuffix("_logs"), _OTHER)
