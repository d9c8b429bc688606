"""Tiles for fp32, by architecture and head size.

They are half as large as those of half precision: so are the registers that their operands leave. Where
torch is told so (``launch.precision``) products are tf32; NVIDIA's others are FMA. ``why``: as in
``tables_half``.
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
    "gfx942": {**_WIDE_CDNA, "dq_logs": Tile(32, 16, 4, 1, "without tf32 32x32 spills")},
    "gfx950": _WIDE_CDNA,
}


# Products by FMA, on every NVIDIA: no rows or keys are too few, but every operand is in registers.
_FMA: Table = {
    "other": Tile(32, 32, 8, 1, "with 128 registers it spills", registers=255),
    "row_delta": Tile(16, 16, 8, 1, "wider tiles, and 4 warps, spill", registers=255),
    "dq": Tile(16, 32, 8, 1, "32x32 spills at head_dim 128", registers=255),
    "map_gradient_logs_each": Tile(16, 16, 8, 1, "wider tiles spill on sm_80 or sm_86"),
    "head_kl": Tile(16, 32, 16, 1, "32x32, and 8 warps, spill on sm_80 or sm_100"),
}
_NARROW_FMA: Table = {
    **_FMA,
    "head_kl": Tile(16, 16, 8, 1, "16x32 with 16 warps spills on sm_80", registers=255),
}
_WIDE_FMA: Table = {
    **_WIDE_MMA_SYNC,
    "map_gradient_logs_each": _FMA["map_gradient_logs_each"],
    "head_kl": _FMA["head_kl"],
}


def table_of(architecture: str, size: int, by_fma: bool) -> Table:
    """The tiles of an architecture for a head size; NVIDIA's without a table takes mma.sync's."""
    if by_fma:
        return _WIDE_FMA if size > 128 else _FMA if size > 64 else _NARROW_FMA
    wide, plain = (_WIDE_TABLES, _WIDE_MMA_SYNC) if size > 128 else (_TABLES, _MMA_SYNC)
    return wide.get(architecture, plain if architecture.startswith("sm_") else {"other": _PLAIN})
