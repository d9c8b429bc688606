"""Which tile each kernel takes, by architecture, head size and dtype: tables, not a search at run time.

A row's ``why`` says what chose it. "static": the bound of ``benchmarks.static_report``; no timing on a
GPU is behind any of them.
"""

from __future__ import annotations

from . import tables_fp32, tables_half
from .tile import GRAIN, Tile

_INTERPRETER = Tile(16, 16, 4, 1, "small: several tiles at sizes that an interpreter can run")


def tile_for(
    kernel: str,
    variant: str,
    architecture: str,
    size: int,
    itemsize: int,
    each: bool = False,
    by_fma: bool = False,
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: its name in the tables. variant: "logs", "scores" or "": what the maps hold.
        architecture: as ``launch.architecture``. size: the larger head size of the two sides.
        itemsize: bytes of an element of q. each: one map a head. by_fma: fp32 products are
            not the matrix unit's (``launch.Call.by_fma``).
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if itemsize > 2:
        table = tables_fp32.table_of(architecture, size, by_fma)
    else:
        table = tables_half.table_of(architecture, size)
    names = (f"{kernel}_{variant}_each", f"{kernel}_{variant}", kernel, "other")
    return next(table[name] for name in names[0 if each else 1 :] if name in table)


__all__ = ["GRAIN", "Tile", "tile_for"]
