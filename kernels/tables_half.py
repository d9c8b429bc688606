"""Tiles for bf16 and fp16, by architecture and head size.

Where ``why`` gives figures they are clocks per score element at head_dim 128 (in wide tables 256) in bf16,
beside the floor, without stack or spills.
"""

from __future__ import annotations

from .tile import Table, Tile

_SM_80: Table = {
    "row_lse": Tile(128, 64, 4, 2, "static 0.135, floor 0.125; 64x64 with 8 warps 0.186"),
    "row_delta": Tile(128, 64, 8, 2, "static 0.141, floor 0.125; 4 warps 0.134, in logs it spills"),
    "statistics": Tile(128, 64, 8, 2, "static 0.264, floor 0.25; 64x64 0.272"),
    "statistics_logs": Tile(64, 64, 8, 2, "static 0.305; 128x64 spills"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.263, floor 0.25; 64x64 0.269"),
    "map_gradient_logs": Tile(64, 64, 8, 2, "static 0.303; 128x64 spills"),
    "pooled_sums": Tile(64, 32, 4, 2, "static 0.277, floor 0.25; 64x64 spills"),
    "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64, and 4 warps, spill"),
    "dq": Tile(64, 32, 4, 2, "static 0.281, floor 0.25"),
    "dk": Tile(32, 64, 4, 2, "static 0.256, floor 0.25"),
    "dk_logs": Tile(64, 64, 8, 2, "32x64 with 4 warps spills"),
    "dk_scores": Tile(32, 64, 4, 1, "with two stages it spills at head sizes 80 and 96"),
    "head_kl": Tile(128, 64, 8, 2, "static 0.272, floor 0.25; 64x64 0.367; 4 warps spill"),
}
# mma.sync as on sm_80, but 99 KB of shared memory a program.
_SM_8X: Table = {
    "row_lse": Tile(128, 64, 4, 2, "as sm_80"),
    "row_delta": Tile(128, 64, 8, 2, "64x64 spills at head sizes 80 and 96"),
    "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64 spills"),
    "dq_logs": Tile(64, 64, 8, 1, "with two stages it spills at head sizes 80 and 96"),
    "dq_scores": Tile(64, 64, 8, 1, "with two stages it spills at head size 64"),
    "dk": Tile(32, 64, 8, 2, "64x64, and fewer warps or one stage, spill here or there"),
}
_SM_120: Table = {
    "row_lse": _SM_8X["row_lse"],
    "pooled_sums": Tile(64, 64, 8, 1, "with two stages it spills"),
    "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64 spills"),
    "dk": _SM_8X["dk"],
}
_SM_90: Table = {
    "row_lse": Tile(128, 64, 4, 2, "static 0.079, floor 0.0625; 8 warps 0.087"),
    "row_delta": Tile(128, 64, 8, 2, "static 0.093, floor 0.0625; 64x64 with 4 warps 0.104"),
    "statistics": Tile(128, 64, 8, 2, "static 0.138, floor 0.125; 64x64 0.177"),
    "statistics_logs": Tile(64, 64, 8, 1, "static 0.292: all wider tiles spill"),
    "map_gradient": Tile(128, 64, 8, 2, "static 0.137, floor 0.125; 64x64 0.183"),
    "map_gradient_logs": Tile(64, 64, 8, 1, "static 0.267: all wider tiles spill"),
    "pooled_sums": Tile(64, 64, 8, 1, "static 0.185, floor 0.125; two stages 0.191"),
    "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64, and 4 warps, spill"),
    "dq": Tile(64, 64, 4, 2, "static 0.150, floor 0.125"),
    "dk": Tile(128, 64, 8, 2, "static 0.143, floor 0.125; 64x64 with 4 warps 0.134 but spills"),
    "dk_logs": Tile(128, 64, 8, 1, "with two stages it spills"),
    "dk_scores": Tile(128, 64, 8, 1, "with two stages it spills"),
    "head_kl": Tile(128, 64, 8, 2, "static 0.197, floor 0.125; 64x64 with 4 warps 0.208"),
}
_SM_100: Table = {
    "row_lse": Tile(128, 64, 4, 2, "static 0.070, floor 0.0625; 64x64 with 8 warps 0.121"),
    "row_delta": Tile(128, 64, 4, 2, "static 0.080, floor 0.0625; 8 warps 0.106"),
    "row_delta_logs": Tile(128, 32, 4, 2, "static 0.107; 128x64 spills, with 8 warps 0.122"),
    "statistics": Tile(128, 64, 8, 2, "static 0.136, floor 0.125; 64x128 with one stage 0.138"),
    "statistics_logs": Tile(64, 64, 8, 1, "static 0.249: all wider tiles spill"),
    "map_gradient": Tile(64, 128, 8, 2, "static 0.139, floor 0.125; 128x64 spills"),
    "map_gradient_logs": Tile(64, 64, 8, 1, "static 0.254: all wider tiles spill"),
    "pooled_sums": Tile(64, 64, 8, 1, "static 0.188, floor 0.125; with two stages it spills"),
    "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64, and 4 warps, spill"),
    "dq": Tile(128, 64, 4, 2, "static 0.088, floor 0.0625"),
    "dq_logs": Tile(128, 32, 4, 2, "static 0.127; 128x64 with 8 warps 0.135"),
    "dk": Tile(32, 128, 4, 2, "static 0.094, floor 0.0625; not turned it spills", turned=True),
    "dk_logs": Tile(32, 128, 8, 2, "with 4 warps it spills", turned=True),
    "head_kl": Tile(128, 32, 4, 2, "static 0.151, floor 0.125; 128x64 spills, 8 warps 0.167"),
}
_CDNA: Table = {
    "pooled_sums_logs": Tile(64, 64, 8, 1, "with two stages it spills"),
    "dq": Tile(64, 32, 4, 1, "64x64 spills; 32x64 takes 58 registers more"),
    "dk": Tile(64, 32, 4, 1, "64x64 spills; 32x64 takes 100 registers more"),
}
_TABLES: dict[str, Table] = {
    "sm_80": _SM_80,
    "sm_86": _SM_8X,
    "sm_89": _SM_8X,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
# Head sizes up to 64, where they want other tiles than the tables say.
_NARROW_TABLES: dict[str, Table] = {
    "sm_80": {"dk_logs": Tile(32, 64, 8, 2, "64x64 and fewer warps spill")},
    "sm_100": {
        "dq": Tile(128, 32, 4, 2, "128x64 spills"),
        "dk_logs": Tile(32, 128, 4, 2, "8 warps spill", turned=True),
    },
}
_OTHER = Tile(64, 64, 8, 2, "the default: compiles without spills wherever a table has no row")

# Head sizes above 128 (padded to 256): operands twice as large. 64 rows, because wgmma and tcgen05 take no
# fewer; one stage, because two do not fit the registers.
_MMA_SYNC_WIDE: Table = {
    "map_gradient": Tile(16, 32, 4, 1, "32x32 spills on sm_86 and sm_89 in logs"),
    "dk": Tile(16, 32, 4, 1, "32x32 spills"),
}
_WIDE_TABLES: dict[str, Table] = {
    "sm_80": {**_MMA_SYNC_WIDE, "statistics_logs": Tile(32, 32, 8, 1, "with 4 warps it spills")},
    "sm_86": _MMA_SYNC_WIDE,
    "sm_89": _MMA_SYNC_WIDE,
    "sm_120": {
        **_MMA_SYNC_WIDE,
        "row_lse_logs": Tile(32, 32, 8, 1, "with 4 warps it spills"),
        "dk": Tile(16, 16, 4, 1, "16x32 and 32x32 spill, with 8 warps too"),
    },
    "sm_90": {
        "dq": Tile(128, 32, 8, 1, "static 0.281, floor 0.25; 64x64 with 8 warps spills"),
        "dk": Tile(128, 32, 8, 1, "static 0.599, floor 0.25: all tiles of 64 keys spill"),
        "dk_scores": Tile(64, 64, 8, 1, "its one product has the keys as rows: 64 for wgmma"),
        "pooled_sums": Tile(64, 32, 8, 1, "static 0.364, floor 0.25: 64x64, and 4 warps, spill"),
    },
    "sm_100": {
        "dk_logs": Tile(32, 64, 4, 1, "static 0.177, floor 0.125: wider tiles spill", turned=True),
        "pooled_sums_logs": Tile(64, 32, 8, 1, "64x64 spills"),
        "dk_logs_each": Tile(32, 64, 8, 1, "with 4 warps it spills", turned=True),
    },
}
_WIDE_ASYNCHRONOUS = Tile(64, 64, 8, 1, "the smallest tile that is wgmma and tcgen05")
_WIDE = Tile(32, 32, 4, 1, "mma.sync and mfma: operands are twice as large")


def table_of(architecture: str, size: int) -> Table:
    """The tiles of an architecture, of any when it has no table, for a head size."""
    if size > 128:
        other = _WIDE_ASYNCHRONOUS if architecture in ("sm_90", "sm_100") else _WIDE
        return {"other": other, **_WIDE_TABLES.get(architecture, {})}
    table = {"other": _OTHER, **_TABLES.get(architecture, {})}
    return table if size > 64 else {**table, **_NARROW_TABLES.get(architecture, {})}
