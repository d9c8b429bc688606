"""Which tile each kernel takes, by architecture and head size: tables, not a search at run time.

A row's ``why`` says what chose it. "static": the bound of ``benchmarks.static_report``; no timing on a
GPU is behind any of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows x keys of a program's tile, warps, pipeline stages, and the reason.

    turned: dk's tile of scores lies keys x rows, so that the first product leaves dS where the second
    wants its left operand (tensor memory of tcgen05).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    why: str
    turned: bool = False


_INTERPRETER = Tile(16, 16, 4, 1, "small: several tiles at sizes that an interpreter can run")

# What the static report measured at head_dim 128 in bf16, without stack or spills (clocks per element).
_SM_80 = {
    "row_delta": Tile(128, 64, 8, 2, "64x64 spills"),
    "statistics": Tile(128, 64, 8, 2, "static 0.259, floor 0.25; 64x64 with 8 warps 0.263"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.257, floor 0.25; 64x64 with 8 warps 0.259"),
    "dq": Tile(64, 32, 4, 2, "static 0.281, floor 0.25"),
    "dk": Tile(32, 64, 4, 2, "static 0.253, floor 0.25; 64x64 with 8 warps 0.255"),
    "dk_logs": Tile(64, 64, 8, 2, "32x64 with 4 warps spills"),
}
_SM_90 = {
    "row_lse": Tile(128, 64, 8, 2, "static 0.087, floor 0.0625"),
    "row_delta": Tile(128, 64, 8, 2, "static 0.101, floor 0.0625"),
    "statistics": Tile(128, 64, 8, 2, "static 0.134, floor 0.125; 64x64 with 4 warps 0.136"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.132, floor 0.125; 64x64 with 4 warps spills"),
    "pooled_sums": Tile(64, 64, 8, 1, "static 0.179, floor 0.125; with two stages it spills"),
    "dq": Tile(64, 64, 4, 2, "static 0.157, floor 0.125"),
    "dk": Tile(128, 64, 8, 2, "static 0.143, floor 0.125; 64x64 with 4 warps 0.134 but spills"),
    "dk_logs": Tile(128, 64, 8, 1, "static 0.155, floor 0.125; with two stages it spills"),
}
_SM_100 = {
    "statistics": Tile(
        64, 128, 8, 1, "static 0.134, floor 0.125; with two stages 24 bytes of stack"
    ),
    "map_gradient": Tile(64, 128, 8, 2, "static 0.134, floor 0.125; 128x64 spills"),
    "pooled_sums": Tile(64, 64, 8, 1, "static 0.173, floor 0.125; with two stages it spills"),
    "dq": Tile(128, 64, 4, 2, "static 0.084, floor 0.0625"),
    "dq_logs": Tile(128, 64, 8, 2, "with 4 warps it spills"),
    "dk": Tile(32, 128, 4, 2, "static 0.111, floor 0.0625; not turned it spills", turned=True),
    "dk_logs": Tile(32, 128, 8, 2, "with 4 warps it spills", turned=True),
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
