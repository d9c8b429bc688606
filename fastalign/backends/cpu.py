"""The CPU backend: one ``Problem`` as calls of the C++ kernels (csrc/align.h).

The kernels turn queries and keys into maps, a few numbers a row, and gradients; what these numbers mean
(losses, thresholds of the sink filter, coefficients of the gradient) is computed here, by the functions
that every backend shares. The kernels keep maps and attention between the two, as far as a fixed
workspace reaches, so that the gradient costs the least when loss and gradient are asked for together.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _build
from ..gradients import entry_gradient, row_coefficients, sink_gradient
from ..maths import (
    expand_target,
    given_map,
    row_statistics,
    row_weights,
    sink_threshold,
    units_of,
)
from ..problem import Problem, Side
from .contract import Forward, Gradients, empty_forward

logger = logging.getLogger("fastalign")

#: The part of the workspace that does not follow the inputs' size: maps, attention and tiles.
WORKSPACE_BYTES = 64 * 2**20

_ABI = 3
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_HEADS = {"mean": 0, "each": 1, "mix": 2}
_NORMALIZE = {"joint": 0, "visual": 1, "visual_per_head": 2, "none": 3}
_DIVERGENCES = {"cosine": 0, "kl": 1, "reverse_kl": 2, "js": 3, "mse": 4}
_WANT_Q, _WANT_K, _WANT_MIX, _WANT_SINK = 1, 2, 4, 8


# ------------------------------------------------------------------- the C interface


class _Tensor(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_int64))


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k")),
        *((name, c_int64) for name in ("heads", "key_heads", "size")),
        *((name, c_double) for name in ("scale", "softcap")),
        *((name, c_void_p) for name in ("given_lse", "sink", "lse")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Side) for name in ("student", "teacher")),
        *((name, c_int64) for name in ("batch", "length", "rows", "groups")),
        *((name, c_void_p) for name in ("positions", "columns", "segments", "blocks")),
        *((name, c_void_p) for name in ("weight", "mix", "target", "target_index")),
        *((name, c_int64) for name in ("target_rows", "target_width")),
        ("temperature", c_double),
        ("window", c_int64),
        *((name, c_int64) for name in ("causal", "wide", "heads", "normalize", "divergence")),
        *((name, c_int64) for name in ("pooled", "in_logs", "sink_filter", "wanted", "local")),
        *((name, c_int64) for name in ("threads", "budget")),
        *((name, c_void_p) for name in ("statistics", "entries", "pool", "moments")),
        *((name, c_void_p) for name in ("d_q", "d_k", "d_mix", "delta")),
    )


class _Coefficients(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("rows", "pooled", "pooled_log"))


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The kernels, compiled now if they have not been.

    Raises:
        fastalign._build.BuildError: they cannot be compiled.
        RuntimeError: the system cannot load the library, it does not speak this file's interface, or it has
            no kernels of the instruction set that ``FASTALIGN_ISA`` names.
    """
    path = _build.find()
    assert path is not None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded ({error}): reinstall fastalign") from error
    library.fa_error.restype = c_char_p
    library.fa_isa.restype = c_char_p
    library.fa_peak_bytes.restype = c_int64
    library.fa_poison.argtypes, library.fa_poison.restype = (c_int64,), None
    library.fa_abi.restype = library.fa_call_size.restype = c_int64
    found = (library.fa_abi(), library.fa_call_size())
    if found != (_ABI, ctypes.sizeof(_Call)):
        raise RuntimeError(
            f"{path} has interface {found}, this Python needs {(_ABI, ctypes.sizeof(_Call))}: reinstall "
            "fastalign, so that both come from one source"
        )
    signatures: dict[str, tuple[Any, ...]] = {
        "fa_open": (POINTER(_Call), POINTER(c_void_p), POINTER(c_int64)),
        "fa_maps": (c_void_p, c_int64),
        "fa_statistics": (c_void_p, c_int64, c_void_p),
        "fa_pool": (c_void_p, c_int64, c_void_p),
        "fa_gradients": (c_void_p, c_int64, c_void_p, POINTER(_Coefficients)),
        "fa_scale": (c_void_p, c_int64, c_double, c_void_p, c_int64),
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int64
    library.fa_close.argtypes, library.fa_close.restype = (c_void_p,), None
    wanted, chosen = os.environ.get("FASTALIGN_ISA"), library.fa_isa().decode()
    if wanted and wanted != chosen:
        raise RuntimeError(
            f"FASTALIGN_ISA is {wanted!r}, which {path} does not hold or this machine lacks; allowed: one "
            f"of generic, avx2, avx512, avx512_bf16 in a portable build, or unset ({chosen} here)"
        )
    return library


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in another type, rounded once; ``factor`` is a scalar tensor of x's device.

    What torch does by way of two temporary tensors, and the kernels in one look at x where x is theirs.
    """
    out = x.new_empty(x.shape, dtype=dtype)
    ours = x.device.type == "cpu" and (x.dtype, dtype) == (torch.float32, torch.bfloat16)
    if not ours or not x.is_contiguous() or unavailable():
        return torch.mul(x, factor.to(x.dtype), out=out)
    load_library().fa_scale(
        x.data_ptr(), x.numel(), float(factor), out.data_ptr(), torch.get_num_threads()
    )
    return out


def peak_workspace() -> int:
    """The most bytes of the kernels' own memory since the last call of this function."""
    peak: int = load_library().fa_peak_bytes()
    return peak


@lru_cache(maxsize=1)
def unavailable() -> str:
    """Why the kernels cannot serve ("": they can), said once; compiles them if they have not been."""
    try:
        load_library()
    except RuntimeError as error:
        logger.warning("the CPU kernels cannot be used: %s", error)
        return str(error)
    return ""


class _Session:
    """One problem in the kernels' hands: the phases of csrc/align.h."""

    def __init__(self, call: _Call) -> None:
        self._library = load_library()
        self._handle = c_void_p()
        chunks = c_int64()
        self._check(self._library.fa_open(byref(call), byref(self._handle), byref(chunks)))
        self.chunks: int = chunks.value

    def maps(self, chunk: int) -> None:
        self._check(self._library.fa_maps(self._handle, chunk))

    def statistics(self, chunk: int, thresholds: Tensor | None) -> None:
        self._check(self._library.fa_statistics(self._handle, chunk, _pointer(thresholds)))

    def pool(self, chunk: int, thresholds: Tensor | None) -> None:
        self._check(self._library.fa_pool(self._handle, chunk, _pointer(thresholds)))

    def gradients(self, chunk: int, thresholds: Tensor | None, by: _Coefficients) -> None:
        self._check(
            self._library.fa_gradients(self._handle, chunk, _pointer(thresholds), byref(by))
        )

    def close(self) -> None:
        self._library.fa_close(self._handle)

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(f"fastalign's CPU kernels: {self._library.fa_error().decode()}")


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ------------------------------------------------------------------- forward, backward


def unsupported(problem: Problem) -> str | None:
    """What of this problem the kernels cannot do, or None."""
    if problem.q_s.device.type != "cpu":
        return f"tensors on {problem.q_s.device.type}"
    reason = unavailable()
    return f"anything here ({reason})" if reason else None


def forward(problem: Problem) -> Forward:
    """The loss, and the statistics of the contract."""
    return align(problem, wanted=0)[0]


def backward(problem: Problem, saved: Forward, grad: Tensor) -> Gradients:
    """The student's gradients for the upstream gradient ``grad`` (scalar), from the inputs alone."""
    wanted = _WANT_Q | _WANT_K
    wanted |= _WANT_MIX if problem.mix is not None else 0
    wanted |= _WANT_SINK if problem.sink_s is not None else 0
    gradients = align(problem, wanted)[1]
    return Gradients(*(x * grad.to(problem.dtype) for x in gradients)).like(problem)


def align(problem: Problem, wanted: int) -> tuple[Forward, Gradients]:
    """The loss and, in one go, its gradients (for an upstream gradient of 1, in ``problem.dtype``).

    Args:
        problem: what is compared.
        wanted: bits 1 (q_s), 2 (k_s), 4 (mix), 8 (sink_s); what is not wanted comes as an empty tensor.
    """
    spec = problem.spec
    # Whether a row's coefficients need nothing of other rows, up to the count of the units.
    local = spec.compare == "row" or (spec.compare == "map" and spec.divergence != "cosine")
    work = _Work(problem, wanted, local)
    out, weight = work.out, work.weight
    with work.session() as session:
        thresholds = None
        if spec.sink_sigma is not None:
            for chunk in range(session.chunks):
                session.maps(chunk)
            thresholds = _thresholds(problem, work.moments, out)
        # With many chunks, a local gradient follows its chunk at once, while its maps are there. The
        # count of units is not known then: it divides at the end.
        follow = bool(wanted) and local and session.chunks > 1
        for chunk in range(session.chunks):
            session.maps(chunk)
            if spec.compare == "pooled":
                session.pool(chunk, thresholds)
            elif thresholds is not None:
                session.statistics(chunk, thresholds)
            if follow:
                units = units_of(spec, out.statistics, weight, out.entries)
                by = row_coefficients(spec, units, units.count).contiguous()
                session.gradients(chunk, thresholds, _Coefficients(rows=_pointer(by)))
        if spec.compare == "pooled":
            _finish_pooling(problem, out)
        units = units_of(spec, out.statistics, weight, out.entries)
        if follow:
            for x in (*work.gradients, work.delta):
                x.div_(units.count)
        elif wanted:
            by = row_coefficients(spec, units, weight.new_ones(())).contiguous()
            coefficients = _Coefficients(rows=_pointer(by))
            if spec.compare == "pooled":
                by = _pooled_gradient(problem, out, by)
                coefficients = _Coefficients(
                    pooled=_pointer(by), pooled_log=_pointer(out.pooled[2])
                )
            for chunk in reversed(range(session.chunks)):
                session.gradients(chunk, thresholds, coefficients)
    gradients = work.gradients
    if wanted & _WANT_SINK:
        by_sink = sink_gradient(problem.sink_s, out.lse_s, work.delta, spec.temperature)
        gradients = gradients._replace(sink_s=by_sink)
    return out._replace(loss=units.loss(spec.divergence)), gradients


class _Work:
    """The tensors of one run, alive as long as the kernels write to them."""

    def __init__(self, problem: Problem, wanted: int, local: bool) -> None:
        p, dtype = problem, problem.dtype
        self.out = empty_forward(p)
        self.weight = row_weights(p)
        batch, rows = p.positions.shape
        filtered = p.spec.sink_sigma is not None
        self.moments = self.weight.new_zeros(2, 2, batch, p.groups, rows if filtered else 0)
        self.gradients = Gradients(
            self.weight.new_empty(p.q_s.shape if wanted & _WANT_Q else (0,)),
            self.weight.new_empty(p.k_s.shape if wanted & _WANT_K else (0,)),
            self.weight.new_zeros(
                p.mix.shape if wanted & _WANT_MIX and p.mix is not None else (0,)
            ),
            self.weight.new_empty((0,)),
        )
        # what a row's sum over V leaves to its softmax, for the sinks; the kernels add to it
        self.delta = self.weight.new_zeros(p.q_s.shape[:3] if wanted & _WANT_SINK else (0,))
        self._kept: list[Tensor] = []
        target = self._real(p.target, dtype)
        self._call = _Call(
            student=self._side(p.student(), self.out.lse_s, dtype),
            teacher=_Side() if p.q_t is None else self._side(p.teacher(), self.out.lse_t, dtype),
            batch=batch,
            length=p.columns.shape[1],
            rows=rows,
            groups=p.groups,
            positions=self._keep(p.positions.contiguous()),
            columns=self._keep(p.columns.contiguous()),
            segments=self._keep(p.segments.contiguous()),
            blocks=None if p.blocks is None else self._keep(p.blocks.contiguous()),
            weight=self._keep(self.weight.contiguous()),
            mix=self._real(p.mix, dtype),
            target=target,
            target_index=None
            if p.target_index is None
            else self._keep(p.target_index.contiguous()),
            target_rows=0 if p.target is None else p.target.shape[-2],
            target_width=0 if p.target is None else p.target.shape[-1],
            temperature=p.spec.temperature,
            window=p.window,
            causal=p.causal,
            wide=dtype == torch.float64,
            heads=_HEADS[p.spec.heads],
            normalize=_NORMALIZE[p.spec.normalize],
            divergence=_DIVERGENCES[p.spec.divergence],
            pooled=p.spec.compare == "pooled",
            in_logs=p.spec.in_logs,
            sink_filter=filtered,
            wanted=wanted,
            local=local,
            threads=torch.get_num_threads(),
            budget=WORKSPACE_BYTES,
            statistics=self.out.statistics.data_ptr(),
            entries=self.out.entries.data_ptr(),
            pool=self.out.pooled.data_ptr(),
            moments=self.moments.data_ptr(),
            d_q=self.gradients.q_s.data_ptr(),
            d_k=self.gradients.k_s.data_ptr(),
            d_mix=self.gradients.mix.data_ptr(),
            delta=self.delta.data_ptr() or None,
        )

    @contextmanager
    def session(self) -> Iterator[_Session]:
        """A session on these tensors, closed at the end."""
        session = _Session(self._call)
        try:
            yield session
        finally:
            session.close()

    def _side(self, side: Side, lse: Tensor, dtype: torch.dtype) -> _Side:
        given = None
        if side.lse is not None:
            values = side.lse.to(dtype)
            given = self._keep(values.masked_fill(values == -math.inf, 0.0).contiguous())
        return _Side(
            q=_strided(side.q),
            k=_strided(side.k),
            heads=side.heads,
            key_heads=side.k.shape[1],
            size=side.q.shape[3],
            scale=side.scale,
            softcap=side.softcap,
            given_lse=given,
            sink=self._real(side.sink, dtype),
            lse=lse.data_ptr(),
        )

    def _real(self, x: Tensor | None, dtype: torch.dtype) -> int | None:
        return None if x is None else self._keep(x.detach().to(dtype).contiguous())

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()


def _strided(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (c_int64 * 4)(*x.stride()), _DTYPES[x.dtype])


def _thresholds(problem: Problem, moments: Tensor, out: Forward) -> Tensor:
    """mean + sigma std of every map, [2, B, G], written to ``out``."""
    used = problem.positions >= 0
    rows, columns = used.sum(-1), problem.columns.sum(-1)
    for side in range(2):
        total, centred = moments[side]
        out.thresholds[side] = sink_threshold(
            total, centred, used.unsqueeze(1), rows, columns, problem.spec
        )
    return out.thresholds


def _finish_pooling(problem: Problem, out: Forward) -> None:
    """Divide the sums over rows by their weights; the statistics of the pooled vectors."""
    spec, pooled = problem.spec, out.pooled
    kept = pooled[4] > 0
    divisor = torch.where(kept, pooled[4], 1.0)
    if spec.in_logs:
        pooled[2:4] = torch.where(kept, pooled[2:4] - divisor.log(), 0.0)
        pooled[0:2] = pooled[2:4].exp() * kept
    else:
        pooled[0:2] /= divisor
    if problem.target is not None:
        pooled[1], pooled[3] = given_map(expand_target(problem), spec, problem.dtype)
    a_s, a_t, log_s, log_t = pooled[:4].unsqueeze(3)
    out.statistics.copy_(row_statistics(spec.divergence, a_s, a_t, log_s, log_t, kept.unsqueeze(2)))


def _pooled_gradient(problem: Problem, out: Forward, by: Tensor) -> Tensor:
    """By each row's entry of a column over its weight, [B, G, L]: by the pooled entry / n_j."""
    a_s, a_t, log_s, log_t, count = out.pooled.unsqueeze(3)
    kept = count > 0
    gradient = entry_gradient(problem.spec, a_s, a_t, log_s, log_t, kept, by)
    return (gradient / torch.where(kept, count, 1.0)).squeeze(2)
