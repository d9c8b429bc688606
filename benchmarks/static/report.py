"""Rows of the static report, and the gates that they must pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from fastalign.kernels.configs import Tile
from fastalign.kernels.launch import by_fma, has_tf32
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

from fastalign.spec import AlignSpec

from .bound import Bound, bound_of, floor_of
from .compiling import TARGETS, Compiled, Target, compile_launch
from .flash import _flash
from .jobs import WORK, has_products, job_of, pairs_of
from .record import LENGTH, VISUAL, Case, Launch, record

#: tf32: fp32 in memory, products as tf32. fp32: products as torch takes them unless told otherwise.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
HEAD_DIMS = (64, 80, 96, 128, 256)
#: Objectives whose launches together are every kernel.
OBJECTIVES = {
    "head mean": AlignSpec(),
    "pooled": AlignSpec(compare="pooled"),
    "head kl": AlignSpec(heads="each", divergence="kl", compare="row"),
}
#: Objectives with other compile-time branches of the same kernels (``--variants``).
VARIANTS = {
    "head mean, in logs": AlignSpec(divergence="js", compare="row"),
    "renormalised": AlignSpec(normalize="visual", divergence="kl", compare="row"),
    "scores": AlignSpec(normalize="none", divergence="mse"),
    "pooled, in logs": AlignSpec(compare="pooled", divergence="kl"),
}
#: Further branches, compiled with ``--variants`` at these head sizes and dtypes: arguments of ``Case``.
BRANCHES_AT = ((64, "bf16"), (128, "bf16"))
_SCATTERED: dict[str, Any] = {"block_ids": torch.arange(LENGTH)[None] % 2, "window": 512}
_SEVERAL: dict[str, Any] = {**_SCATTERED, "softcap_s": 50.0, "softcap_t": 50.0}
_PITCH = 2**31 // LENGTH // 16 * 16 + 4096  # a row's offset in q or k passes 2^31
BRANCHES: dict[str, dict[str, Any]] = {
    "few rows": {"rows": 16},
    "few rows, pooled": {"rows": 16, "spec": AlignSpec(compare="pooled", divergence="kl")},
    "64-bit offsets": {"pitch": _PITCH},
    "scattered blocks": {"given": _SCATTERED},
    "scattered blocks, in logs": {
        "given": _SCATTERED,
        "spec": AlignSpec(divergence="js", compare="row"),
    },
    "softcap": {"given": {"softcap_s": 50.0, "softcap_t": 50.0}},
    "softcap, head kl": {
        "given": {"softcap_s": 50.0, "softcap_t": 50.0},
        "spec": AlignSpec(heads="each", divergence="kl", compare="row"),
        "heads_t": 16,
    },
    "sinks, head kl": {
        "given": {"sink_s": torch.zeros(16), "sink_t": torch.zeros(16)},
        "spec": AlignSpec(heads="each", divergence="kl", compare="row"),
        "heads_t": 16,
    },
    "sink filter": {"spec": AlignSpec(sink_sigma=3.0)},
    "mix": {"given": {"mix": torch.zeros(16, 20)}, "spec": AlignSpec(heads="mix")},
    "given map": {"given": {"target": torch.zeros(1, 1, LENGTH, VISUAL)}},
    # the worst of them at once
    "several": {"pitch": _PITCH, "given": _SEVERAL, "spec": AlignSpec(sink_sigma=3.0)},
    "several, in logs": {
        "pitch": _PITCH,
        "given": _SEVERAL,
        "spec": AlignSpec(divergence="js", compare="row"),
    },
    "several, head kl": {
        "pitch": _PITCH,
        "given": {**_SEVERAL, "sink_s": torch.zeros(16), "sink_t": torch.zeros(16)},
        "spec": AlignSpec(heads="each", divergence="kl", compare="row"),
        "heads_t": 16,
    },
    "several, mix": {
        "pitch": _PITCH,
        "given": {**_SEVERAL, "mix": torch.zeros(16, 20)},
        "spec": AlignSpec(heads="mix"),
    },
    "several, given map": {
        "pitch": _PITCH,
        "given": {
            **_SCATTERED,
            "softcap_s": 50.0,
            "target": torch.zeros(1, 1, LENGTH, VISUAL),
        },
    },
}
#: Tiles of the yardstick, from the tutorial's own list of configurations.
YARDSTICKS = (
    Tile(64, 64, 4, 2, "small"),
    Tile(128, 64, 4, 2, "tall"),
    Tile(128, 64, 8, 2, "tall, two warp groups"),
)


@dataclass(frozen=True)
class Limit:
    """A sum of kernels whose bound must stay near its floor, at head_dim 128 in bf16.

    Attributes:
        kernels: (kernel, how many times it runs). flops, exps: of the floor, in units of D FLOP and of one
            exponential per score element and head of both models (peers of the issue: the forward takes
            4 D and 2, the backward 12 D and 4); None: the sum of the kernels' own floors.
    """

    name: str
    kernels: tuple[tuple[str, int], ...]
    most: float
    floor: tuple[int, int] | None = None


LIMITS = (
    Limit("forward, log-sum-exps given", (("statistics", 1),), 1.25),
    Limit("forward with its own log-sum-exps", (("row_lse", 2), ("statistics", 1)), 1.25),
    Limit("dq + dk", (("dq", 1), ("dk", 1)), 1.6),
    Limit(
        "whole backward",  # row_delta is our own, the floor does not know it
        (("map_gradient", 1), ("row_delta", 1), ("dq", 1), ("dk", 1)),
        1.7,
        floor=(12, 4),
    ),
)
LIMITED_TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Row:
    """One compiled kernel; the fields of the JSON report.

    Attributes:
        registers: per thread. clocks_per_element, floor, ratio: the static bound of all code of a tile
            (inner loops and what lies between), per score element; None where there is none (AMD,
            kernels without products). inner: of the inner loops alone. limiter: the pipe that bounds
            them. smem_clocks: the shared-memory pipe's clocks, which the bound leaves out.
        bytes_per_element: q and k that a program reads, per score element: what L2 must deliver.
        pairs: visible (row, key) pairs of a dk launch, for its average over the lists of keys.
    """

    kernel: str
    target: str
    dtype: str
    head_dim: int
    config: str
    objective: str
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    smem_bytes: int = 0
    smem_limit: int = 0
    tensor_core_ops: int = 0
    ex2: int = 0
    atomics: int = 0
    clocks_per_element: float | None = None
    inner: float | None = None
    floor: float | None = None
    ratio: float | None = None
    limiter: str | None = None
    smem_clocks: float | None = None
    bytes_per_element: float | None = None
    pairs: int | None = None
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def launches(
    target: str, head_dim: int, dtype: str, variants: bool
) -> Iterator[tuple[str, Launch]]:
    """(objective, launch) of every distinct launch of every objective on a target."""
    seen = set()
    for objective, case in _cases(head_dim, dtype, variants):
        for launch in record(case, target):
            constants = tuple(
                (p.name, launch.arguments[p.name]) for p in launch.kernel.params if p.is_constexpr
            )
            key = (launch.name, constants)
            if key not in seen:
                seen.add(key)
                yield objective, launch
    if dtype == "fp32":
        return  # the yardstick knows no products but the matrix unit's
    for tile in YARDSTICKS:
        yield "yardstick", flash_launch(head_dim, DTYPES[dtype], tile)


def _cases(head_dim: int, dtype: str, variants: bool) -> Iterator[tuple[str, Case]]:
    tf32 = dtype == "tf32"
    for objective, spec in {**OBJECTIVES, **(VARIANTS if variants else {})}.items():
        heads_t = 16 if spec.heads == "each" else 20
        yield objective, Case(head_dim, DTYPES[dtype], 16, heads_t, 4, spec, tf32=tf32)
    if variants and (head_dim, dtype) in BRANCHES_AT:
        for objective, arguments in BRANCHES.items():
            yield objective, Case(head_dim, DTYPES[dtype], **arguments, tf32=tf32)


def flash_launch(head_dim: int, dtype: torch.dtype, tile: Tile) -> Launch:
    """A launch of the yardstick kernel."""
    size = 1 << (head_dim - 1).bit_length()
    x = torch.zeros(16, LENGTH // 128 * 128, size, dtype=dtype)
    arguments = {"p_q": x, "p_k": x, "p_v": x, "p_out": x, "factor": 0.1}
    sizes = {"rows": x.shape[1], "keys": x.shape[1], "BDS": size, "DS": size}
    return Launch(_flash, {**arguments, **sizes, "BR": tile.rows, "BC": tile.keys}, tile)


def row_of(objective: str, launch: Launch, target: Target, head_dim: int, dtype: str) -> Row:
    """Compile a launch and say what came out."""
    tile = launch.tile
    config = f"{tile.rows}x{tile.keys}, {tile.warps} warps, {tile.stages} stages"
    config += "" if tile.registers is None else f", {tile.registers} registers"
    config += ", mma.sync" if tile.mma_sync else ""
    name = launch.name
    if "INSIDE" in launch.arguments:
        name += "" if launch.arguments["INSIDE"] else " (other keys)"
    row = Row(
        kernel=name,
        target=target.name,
        dtype=dtype,
        head_dim=head_dim,
        config=config,
        objective=objective,
        smem_limit=target.smem_limit,
    )
    try:
        compiled = compile_launch(launch, target)
    except (CompilationError, PTXASError, RuntimeError) as error:
        reason = f"does not compile: {str(error).strip().splitlines()[-1]}"
        return replace(row, problems=(reason,))
    bound = None if objective in BRANCHES else _bound(launch, compiled)  # jobs know no branches
    # row_sums takes no products, and has no precision
    precision = launch.arguments.get("PRECISION", "")
    fma = by_fma(DTYPES[dtype], precision, target.name)
    wanted = r"HMMA|HGMMA|UTC\w*MMA" if fma else "HMMA" if tile.mma_sync else target.tensor_core
    on_unit = compiled.products > 0 and not fma
    products = len(re.findall(rf"\b(?:{wanted})\S*", compiled.code))
    ex2 = r"MUFU\.EX2" if target.backend == "cuda" else r"v_exp_f32"
    row = replace(
        row,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        spills=compiled.spills,
        smem_bytes=compiled.smem_bytes,
        tensor_core_ops=products,
        ex2=len(re.findall(ex2, compiled.code)),
        atomics=compiled.atomics,
        clocks_per_element=None if bound is None else round(bound.clocks, 5),
        inner=None if bound is None else round(bound.inner, 5),
        floor=None if bound is None else round(bound.floor, 5),
        ratio=None if bound is None else round(bound.ratio, 3),
        limiter=None if bound is None else bound.limiter,
        smem_clocks=None if bound is None else round(bound.shared_clocks, 5),
        bytes_per_element=_bytes(launch),
        pairs=pairs_of(launch) if launch.name == "dk" else None,
    )
    problems = _problems(row, compiled, has_products(launch), wanted, on_unit)
    return replace(row, problems=tuple(problems))


def _bound(launch: Launch, compiled: Compiled) -> Bound | None:
    if compiled.target.backend != "cuda" or launch.name not in WORK:
        return None
    try:
        return bound_of(compiled, job_of(launch))
    except ValueError:
        return None


def _bytes(launch: Launch) -> float | None:
    """q and k loaded per score element; a stationary operand counts nothing."""
    a = launch.arguments
    if launch.name not in WORK or launch.name == "flash":
        return None
    size = int(a["p_qs"].element_size() * a["DS"])
    rows, keys = int(a["BR"]), int(a["BC"])
    if launch.name in ("statistics", "map_gradient", "pooled_sums"):
        return 2 * size * (rows + keys) / (rows * keys)  # both sides, both operands of every head
    sides = 2 if launch.name == "head_kl" else 1
    return sides * size / (keys if launch.name == "dk" else rows)


def _problems(
    row: Row, compiled: Compiled, products: bool, wanted: str, on_unit: bool
) -> Iterator[str]:
    """What keeps a compiled kernel from being shipped.

    Args:
        products: whether its task takes any. wanted: the matrix unit's instruction; on_unit: whether
            it must be there: for all products that the source asks for but those by FMA.
    """
    if row.kernel == "flash":
        return  # the yardstick, not ours
    if row.stack_bytes or row.spills:
        yield f"{row.stack_bytes} bytes of stack, {row.spills} spills"
    if row.smem_bytes > row.smem_limit:
        yield f"{row.smem_bytes} bytes of shared memory, limit {row.smem_limit}"
    if compiled.target.backend == "cuda":
        # the file is handed out in units of 8 registers a thread
        used = -(-row.registers // 8) * 8 * 32 * compiled.warps
        if used > compiled.target.registers:
            yield f"{used} registers, limit {compiled.target.registers}"
    if row.atomics:
        yield f"{row.atomics} atomics"
    if products != (compiled.products > 0):
        yield f"{compiled.products} matrix products where {'some are' if products else 'none is'} needed"
    if on_unit != bool(row.tensor_core_ops):
        yield f"{row.tensor_core_ops} {wanted} for {compiled.products} {row.dtype} products"


def failures(rows: Iterable[Row]) -> list[str]:
    """Every gate that is not met, in words."""
    rows = list(rows)
    out = [
        f"{r.kernel} ({r.objective}), {r.target}, {r.dtype}, head_dim {r.head_dim}, {r.config}: {p}"
        for r in rows
        for p in r.problems
    ]
    return out + [
        f"{total.name}, {total.target}: {total.ratio} x the floor, limit {total.most}"
        for total in sums(rows)
        if total.target in LIMITED_TARGETS and not (total.ratio and total.ratio <= total.most)
    ]


@dataclass(frozen=True)
class Sum:
    """A ``Limit`` of a target, worked out: clocks and floor per score element; None: no bound."""

    name: str
    target: str
    clocks: float | None
    floor: float | None
    ratio: float | None
    most: float


def sums(rows: Iterable[Row]) -> list[Sum]:
    """Every limit on every target whose kernels are all among the rows, in the limits' order."""
    measured = [
        r
        for r in rows
        if (r.dtype, r.head_dim, r.objective) == ("bf16", 128, "head mean") and r.kernel != "flash"
    ]
    out = []
    for target in TARGETS.values():
        if target.backend != "cuda":
            continue
        for limit in LIMITS:
            launched = [
                [r for r in measured if (r.target, r.kernel.split(" (")[0]) == (target.name, name)]
                for name, _ in limit.kernels
            ]
            if all(launched):
                out.append(_sum(limit, target.name, launched))
    return out


def _sum(limit: Limit, target: str, launched: list[list[Row]]) -> Sum:
    """The launches of each kernel averaged over their pairs, the kernels added up."""
    clocks, floor = 0.0, 0.0
    for (_, times), rows in zip(limit.kernels, launched, strict=True):
        if any(r.clocks_per_element is None or r.floor is None for r in rows):
            return Sum(limit.name, target, None, None, None, limit.most)
        pairs = [r.pairs or 1 for r in rows]
        total = sum(n * (r.clocks_per_element or 0.0) for n, r in zip(pairs, rows, strict=True))
        clocks += times * total / sum(pairs)
        floor += times * (rows[0].floor or 0.0)
    if limit.floor is not None:
        floor = floor_of(target, limit.floor[0] * 128, limit.floor[1])
    return Sum(
        limit.name, target, round(clocks, 5), round(floor, 5), round(clocks / floor, 3), limit.most
    )


__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "TARGETS",
    "Row",
    "failures",
    "has_tf32",
    "launches",
    "row_of",
    "sums",
]
