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
    products, exps = WORK[name]
    flops = 2.0 * rows * keys * a["BDS"]
    floors = (2.0 * a["DS"] * products, float(exps))
    if name in ("statistics", "map_gradient", "pooled_sums"):
        if a["HEADS"] != "mean":  # one loop over tiles, a product of each side in it
            return Job((1.0,), 2 * flops, float(rows * keys), *floors)
        heads = (float(a["heads_s"]), float(a["heads_t"]))
        return Job(heads, flops, rows * keys * sum(heads) / 2, *floors)
    if name == "flash":
        passes: tuple[float, ...] = (LENGTH // 64 * 64 / keys,)
    elif name == "dk":
        passes = _passes(a["p_keys"], 3, keys, rows, a["INTERVAL"])
    else:
        slots: tuple[int, ...] = (a["LO"],) if name == "row_lse" else (6,)
        if a.get("OTHERS", False):
            slots = (6, 8)
        passes = sum((_passes(a["p_rows"], s, rows, keys, a["INTERVAL"]) for s in slots), ())
    return Job(passes, flops * products, sum(passes) * rows * keys, *floors)


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
