"""Tiles for fp32, by architecture and head size.

They are half as large as those of half precision: so are the registers that their operands leave. Products
are tf32 where there is any (``launch.precision``). ``why``: as in ``tables_half``.
"""

from __future__ import annotations

from dataclasses import replace

from .tile import Table, Tile

_PLAIN = Tile(32, 32, 4, 1, "mfma: no spills but where a table says otherwise")
_EACH = Tile(16, 32, 4, 1, "32x32 spills with a map a head", registers=255)
_MMA_SYNC: Table = {
    "other": Tile(32, 32, 8, 1, "two programs side by side", registers=128),
    "map_gradient_logs_each": Tile(32, 32, 8, 1, "with 128 registers it spills", registers=255),
    "head_kl": Tile(32, 32, 8, 1, "with a cap of 192 to 255 registers it spills"),
    "dq_logs": Tile(32, 32, 8, 1, "with 128 registers it spills on sm_120", registers=255),
    "dk": Tile(32, 32, 8, 1, "with 128 registers it spills in logs", registers=255),
}
_SM_8X: Table = {**_MMA_SYNC, "map_gradient_logs_each": _EACH}
_ASYNCHRONOUS: Table = {
    "other": Tile(64, 64, 8, 1, "the smallest tile that is wgmma and tcgen05"),
    "row_lse": Tile(64, 32, 4, 1, "wgmma and tcgen05 take 64 rows; 64x64 with 8 warps is slower"),
    "row_delta": Tile(64, 32, 4, 1, "as row_lse"),
    "head_kl": Tile(64, 32, 4, 1, "as row_lse"),
    "dq": Tile(64, 32, 4, 1, "64x64 is slower, and spills on sm_100"),
}
_TABLES: dict[str, Table] = {
    "sm_80": _MMA_SYNC,
    "sm_86": _SM_8X,
    "sm_89": _SM_8X,
    "sm_120": {
        **_MMA_SYNC,
        "head_kl": Tile(32, 32, 8, 1, "without the cap it spills at head size 64", registers=255),
    },
    "sm_90": {
        **_ASYNCHRONOUS,
        "pooled_sums": Tile(64, 32, 8, 1, "64x64, and 4 warps, spill"),
        "dk": Tile(64, 32, 4, 1, "64x64 spills; its second product is mma.sync"),
        "dk_scores": Tile(64, 64, 8, 1, "its one product has the keys as rows: 64 for wgmma"),
    },
    "sm_100": {
        **_ASYNCHRONOUS,
        "map_gradient": Tile(64, 32, 4, 1, "64x64 spills at head_dim 64"),
        "pooled_sums": Tile(64, 32, 8, 1, "64x64 spills at head_dim 96, 4 warps at 128"),
    },
}

# Above 128: 64 rows of 256 numbers, which wgmma and tcgen05 want, are a quarter of the registers.
_WIDE_MMA_SYNC: Table = {
    "other": Tile(32, 32, 8, 1, "with fewer registers dq and dk spill", registers=255),
    "map_gradient_logs_each": _EACH,
    "head_kl": Tile(16, 16, 4, 1, "16x32 and 32x32 spill, and this one with 192 to 255 registers"),
    "dk_logs": Tile(16, 16, 8, 1, "32x32 and 32x16 spill", registers=255),
    "dk_logs_each": Tile(32, 32, 8, 1, "as other", registers=255),
}
# The same on an architecture that has better, for kernels which spill in every tile of 64 rows.
_FALLBACK = {name: replace(x, mma_sync=True) for name, x in _WIDE_MMA_SYNC.items()}
_WIDE_ASYNCHRONOUS: Table = {
    **_FALLBACK,
    "row_lse": Tile(64, 32, 4, 1, "static 0.204 on sm_90; with 8 warps 0.329"),
    "row_delta": Tile(64, 32, 4, 1, "static 0.210 on sm_90; with 8 warps 0.327"),
    "head_kl": Tile(64, 32, 8, 1, "with 4 warps it spills"),
}
_WIDE_CDNA: Table = {
    "other": _PLAIN,
    "head_kl": Tile(32, 16, 4, 1, "32x32 spills"),
    "dk": Tile(32, 16, 4, 1, "32x32 spills on gfx950"),
}
_WIDE_TABLES: dict[str, Table] = {
    "sm_80": _WIDE_MMA_SYNC,
    "sm_86": _WIDE_MMA_SYNC,
    "sm_89": _WIDE_MMA_SYNC,
    "sm_120": _WIDE_MMA_SYNC,
    "sm_90": {
        **_WIDE_ASYNCHRONOUS,
        "statistics": Tile(64, 32, 8, 2, "with one stage, or 64 keys, it spills"),
        "map_gradient": Tile(64, 32, 8, 2, "with one stage it spills"),
        "pooled_sums": Tile(64, 32, 8, 2, "with one stage it spills"),
        "dq_scores": Tile(64, 32, 8, 1, "with 4 warps it spills"),
        "dk_scores": Tile(16, 64, 8, 1, "not turned it is no wgmma", turned=True),
    },
    "sm_100": {
        **_WIDE_ASYNCHRONOUS,
        "dq": Tile(64, 32, 8, 1, "with 4 warps it spills"),
        "dk_scores": Tile(32, 64, 8, 1, "not turned it is no tcgen05", turned=True),
    },
    "gfx942": _WIDE_CDNA,
    "gfx950": _WIDE_CDNA,
}


def table_of(architecture: str, size: int, tf32: bool) -> Table:
    """The tiles of an architecture for a head size.

    mma.sync's are NVIDIA's without a table and, with other products than tf32, all of NVIDIA's: FMA takes
    them from registers, in which 64 rows spill thousands of numbers.
    """
    wide, plain = (_WIDE_TABLES, _WIDE_MMA_SYNC) if size > 128 else (_TABLES, _MMA_SYNC)
    if not architecture.startswith("sm_"):
        return wide.get(architecture, {"other": _PLAIN})
    return wide.get(architecture, plain) if tf32 else plain
