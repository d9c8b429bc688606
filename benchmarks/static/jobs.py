"""What each kernel has to compute per score element: the floors of the report."""

from __future__ import annotations

from .bound import Job
from .record import LENGTH, VISUAL, Launch

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
    """The job of a recorded launch; the head-mean kernels count student and teacher as one element."""
    a, name = launch.arguments, launch.name
    rows, keys = a["BR"], a["BC"]
    padded, depth = a["BDS"], a["DS"]
    products, exps = WORK[name]
    if name in ("statistics", "map_gradient", "pooled_sums"):
        heads = a["heads_s"] + a["heads_t"] if a["HEADS"] == "mean" else 2
        return Job(
            products=heads,
            flops=2.0 * rows * keys * padded,
            elements=rows * keys * heads / 2,
            flops_floor=2.0 * depth * products,
            exps_floor=exps,
        )
    sweep = {
        "row_lse": LENGTH,
        "row_delta": VISUAL,
        "dq": LENGTH,
        "head_kl": LENGTH,
        "flash": LENGTH // 64 * 64,
    }.get(name)
    if name == "dk":
        steps, across = -(-LENGTH // rows) * a["REPEAT_S"], keys
        elements = LENGTH * a["REPEAT_S"] * across
    else:
        assert sweep is not None
        steps, elements = -(-sweep // keys), sweep * rows
    return Job(
        products=steps,
        flops=2.0 * rows * keys * padded * products,
        elements=float(elements),
        flops_floor=2.0 * depth * products,
        exps_floor=exps,
    )
