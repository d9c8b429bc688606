"""Autotuning, on demand: ``FASTALIGN_AUTOTUNE=1`` times a table's tile against its neighbours.

Off by default: tables give every run of an architecture the same tiles, and with them the same bits.
With it, the first launch of a kernel with given compile-time facts (objective, head sizes, dtypes) times
the candidates on that launch's own tensors; triton keeps the winner on disk (``TRITON_CACHE_DIR``), so
that later processes do not search. Never under the interpreter, and never while a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import triton

from .configs import GRAIN, Tile

VARIABLE = "FASTALIGN_AUTOTUNE"


def wanted() -> bool:
    """Whether the environment asks for autotuning.

    Raises:
        ValueError: the variable is neither 0, 1 nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}: 1 (on), or 0 or nothing (off)")
    return value == "1"


def candidates(tile: Tile) -> list[Tile]:
    """The tile and those one step away in one field: half or double, one stage more or less."""

    def steps() -> Iterator[Tile]:
        for name, least, most in (("rows", 16, GRAIN), ("keys", 16, GRAIN), ("warps", 4, 8)):
            value = getattr(tile, name)
            for other in (value // 2, 2 * value):
                if least <= other <= most:
                    yield replace(tile, **{name: other}, why="a neighbour")
        for stages in (tile.stages - 1, tile.stages + 1):
            if 1 <= stages <= 4:
                yield replace(tile, stages=stages, why="a neighbour")

    return [tile, *steps()]


@cache
def tuned(kernel: Any, tile: Tile, restore: tuple[str, ...]) -> Any:
    """The kernel, choosing among the candidates of ``tile`` at its first launch.

    Args:
        restore: arguments that the kernel reads and writes: put back after each timing.
    """
    configs = [
        triton.Config(
            {"BR": t.rows, "BC": t.keys},
            num_warps=t.warps,
            num_stages=t.stages,
            maxnreg=t.registers,
        )
        for t in candidates(tile)
    ]
    facts = [p.name for p in kernel.params if p.is_constexpr and p.name not in ("BR", "BC")]
    return triton.autotune(configs, key=facts, restore_value=list(restore), cache_results=True)(
        kernel
    )
