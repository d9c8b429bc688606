"""What each kernel has to compute per score element: the floors of the report."""

from __future__ import annotations

from torch import Tensor

from .bound import Job
from .record import LENGTH, Launch

#: kernel -> (products of depth D per element and side or pass, exponentials per element).
WORK = {
    "row_lse": (1, 1),
    "statistics": (2, 2),
    "map_gradient": (2, 2),
    "pooled_sums": (2, 2),
    "row_delta": (1, 1),
    "dq": (2, 1),
    "dk": (2, 1),
    "head_kl": (2, 2),
    "flash": (2, 1),
}


def job_of(launch: Launch) -> Job:
    """The job of a recorded launch; the head-mean kernels count student and teacher as one element.

    How many tiles have a mask and how many have none is counted on the recorded lists.
    """
    a, name = launch.arguments, launch.name
    rows, keys = a["BR"], a["BC"]
    tile = float(rows * keys)
    products, exps = WORK[name]
    if a.get("SCORES", False):  # maps of scores: no softmax
        exps = 0
    flops = 2.0 * tile * a["BDS"]
    floors = (2.0 * a["DS"] * products, float(exps))
    if name in ("statistics", "map_gradient", "pooled_sums"):
        if name == "pooled_sums":
            tiles = _passes(a["p_keys"], 3, keys, rows, False)[0]
        else:
            tiles = _passes(a["p_rows"], 6, rows, keys, False)[0]
        turns = max(tiles / a["parts"], 1.0)
        if a["HEADS"] != "mean":  # one loop over tiles, a product of each side in it
            return Job((turns,), 2 * flops, exps * tile, turns * tile, *floors)
        heads = (float(a["heads_s"]), float(a["heads_t"]))
        both = tile * sum(heads) / 2
        return Job(heads, flops, exps / 2 * tile, both, *floors, turns=turns)
    turns = 0.0
    if name == "flash":
        passes: tuple[float, ...] = (LENGTH // 128 * 128 / keys,)
    elif name == "dk":
        passes = _passes(a["p_keys"], 3, keys, rows, a["INTERVAL"])
        turns = float(a["REPEAT_S"]) if a["REPEAT_S"] > 1 else 0.0
    else:
        slots: tuple[int, ...] = (a["LO"],) if name == "row_lse" else (6,)
        if a.get("OTHERS", False):
            slots = (6, 8)
        passes = sum((_passes(a["p_rows"], s, rows, keys, a["INTERVAL"]) for s in slots), ())
        passes = tuple(count / a.get("parts", 1) for count in passes)
    return Job(passes, flops * products, exps * tile, sum(passes) * tile, *floors, turns=turns)


def has_products(launch: Launch) -> bool:
    """Whether what a launch computes takes matrix products at all; its code is not looked at.

    row_sums counts. row_delta of heads that are compared by themselves in logs adds up the workspace.
    map_gradient of vectors pooled from maps as they are spreads a gradient over rows that does not depend
    on the maps, unless the sink filter asks for their entries.
    """
    a = launch.arguments
    if launch.name == "row_sums":
        return False
    if launch.name == "row_delta":
        return not (a["HEADS"] == "each" and a["LOGS"])
    if launch.name == "map_gradient" and a["POOLED"]:
        return bool(a["LOGS"] or a["SINK"])
    return True


def pairs_of(launch: Launch) -> int:
    """(row, key) pairs that the keys of a dk launch are seen in."""
    entries: Tensor = launch.arguments["p_keys"]
    return int((entries[:, 4] - entries[:, 3]).clamp(min=0).sum())


def _passes(entries: Tensor, slot: int, block: int, size: int, interval: bool) -> tuple[float, ...]:
    """Tiles with a mask, and tiles without one, of an average program (``primitives.inner_tiles``).

    Args:
        entries: a list, [B, slots, length]; ``slot`` and the next one hold the ranges of its entries.
        block: entries of a program. size: partner entries of a tile.
    """
    real = entries[:, 1] >= 0
    lo, hi = entries[:, slot], entries[:, slot + 1]
    edges, inner, programs = 0, 0, 0
    for sample in range(len(entries)):
        for start in range(0, int(real[sample].sum()), block):
            part = slice(start, start + block)
            b_real, b_lo, b_hi = real[sample, part], lo[sample, part], hi[sample, part]
            i_lo, i_hi = int(b_lo.min()) // size, -(-int(b_hi.max()) // size)
            i_in = min(max(-(-int(b_lo[b_real].max()) // size), i_lo), max(i_hi, i_lo))
            i_out = max(min(int(b_hi[b_real].min()) // size, i_hi), i_in) if interval else i_in
            edges += max(i_hi - i_lo, 0) - (i_out - i_in)
            inner += i_out - i_in
            programs += 1
    return (edges / programs, inner / programs) if interval else (edges / programs,)
