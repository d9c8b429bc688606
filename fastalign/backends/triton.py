"""The Triton backend: index lists, launches, and the few torch operators between kernels.

What kernels see of a spec is little. Head shares and normalisation go into the log-sum-exps: with

    l_h = LSE_h (+ log H for the head mean) (+ log mass for normalize="visual"),
    mass = mean_h exp(LSE_h over V - LSE_h over every key)

every map is A = sum_h exp(S_h - l_h), whatever the spec. From row statistics to the loss and to
coefficients the code is ``maths`` and ``gradients``, shared by all backends. The backward holds the
gradient of the head-free map in a workspace of at most ``WORKSPACE_BYTES``, rows chunk by chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _kernels
from ..gradients import entry_gradient, row_coefficients, sink_gradient
from ..maths import (
    densify,
    expand_target,
    given_map,
    row_weights,
    sink_threshold,
    units_of,
)
from ..maths import row_statistics as statistics_of
from ..problem import Problem
from ..problem import Side as ModelSide
from .contract import Forward, Gradients, empty_forward

_kernels.locate()
try:
    from ..kernels.configs import GRAIN
    from ..kernels.dk import dk as write_dk
    from ..kernels.dq import HeadTensors
    from ..kernels.dq import dq as write_dq
    from ..kernels.head_kl import head_kl
    from ..kernels.launch import Call, Side, interpreting, upcast
    from ..kernels.lists import build_lists
    from ..kernels.map_gradient import Upstream, Workspace, map_gradient
    from ..kernels.maps import MapTensors
    from ..kernels.pooled import pooled_sums
    from ..kernels.row_delta import row_delta
    from ..kernels.row_lse import row_lse
    from ..kernels.row_sums import row_sums
    from ..kernels.statistics import row_moments, row_statistics

    INSTALLED = True
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    INSTALLED = False

LOG2E = 1 / math.log(2)
#: What the head-free maps of a chunk of rows may take in the backward.
WORKSPACE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """A problem as the kernels take it."""

    problem: Problem
    call: Call
    student: Side
    teacher: Side | None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve a problem, or None."""
    if not INSTALLED:
        return "anything without the package triton"
    if problem.q_s.device.type == "cpu" and not interpreting():
        return "tensors on cpu (its kernels run on cuda, ROCm and xpu)"
    if problem.dtype == torch.float64:
        return "float64 q or k (float16, bfloat16 and float32 only)"
    largest = max(x.shape[3] for x in (problem.q_s, problem.q_t) if x is not None)
    if largest > 256:
        return f"a head size of {largest} (at most 256)"
    return None


def forward(problem: Problem) -> Forward:
    """The loss, and the statistics that ``backward`` needs."""
    out = empty_forward(problem)
    spec, weight = problem.spec, row_weights(problem)
    if not _anything(problem):
        return out._replace(loss=out.loss.zero_())
    plan = _plan(problem)
    entries, _ = row_sums(plan.call, None)
    if _one_pass(problem):
        lse_s, lse_t, kl = _head_kl(plan)
        loss = _loss(problem, kl.unsqueeze(0), weight, entries)
        return out._replace(
            loss=loss, lse_s=lse_s, lse_t=lse_t, statistics=kl.unsqueeze(0), entries=entries
        )
    out = _log_sum_exps(plan, out)
    maps = _map_tensors(plan, out)
    if spec.sink_sigma is not None:
        out = out._replace(thresholds=_sink_thresholds(plan, maps))
        maps = replace(maps, thresholds=out.thresholds)
    if spec.compare == "pooled":
        pooled, statistics = _pooled(plan, maps, weight)
        out = out._replace(pooled=pooled)
    else:
        statistics = row_statistics(plan.call, maps)
    loss = _loss(problem, statistics, weight, entries)
    return out._replace(loss=loss, statistics=statistics, entries=entries)


def backward(problem: Problem, saved: Forward, grad: Tensor) -> Gradients:
    """Gradients of the student for the upstream gradient ``grad`` (scalar)."""
    spec, p = problem.spec, problem
    out_dtype = torch.float32 if upcast(p.q_s.dtype) else p.q_s.dtype
    dq = torch.zeros(p.q_s.shape, dtype=out_dtype, device=p.q_s.device)
    dmix = torch.zeros(
        (0,) if p.mix is None else p.mix.shape, dtype=torch.float32, device=dq.device
    )
    total = torch.zeros(p.q_s.shape[:3], dtype=torch.float32, device=dq.device)
    if not _anything(problem):
        dk = torch.zeros(p.k_s.shape, dtype=p.k_s.dtype, device=dq.device)
        dsink = sink_gradient(p.sink_s, saved.lse_s, total, spec.temperature)
        return Gradients(dq, dk, dmix, dsink).like(problem)
    plan = _plan(problem)
    call, weight = plan.call, row_weights(problem)
    maps = _map_tensors(plan, saved)
    if spec.sink_sigma is not None:
        maps = replace(maps, thresholds=saved.thresholds.contiguous())
    units = units_of(spec, saved.statistics, weight, saved.entries)
    coefficients = row_coefficients(spec, units, grad)
    upstream = Upstream(
        coefficients.contiguous(), _pooled_upstream(p, saved, coefficients), weight.contiguous()
    )
    chunks = list(_chunks(plan))
    whole = len(chunks) == 1
    dk_dtype = torch.float32 if not whole or upcast(p.k_s.dtype) else p.k_s.dtype
    dk = torch.zeros(p.k_s.shape, dtype=dk_dtype, device=dq.device)
    for start, end in chunks:
        space = _workspace(plan, start, end)
        map_gradient(call, maps, upstream, space)
        delta, dmix_part = _delta(plan, maps, space)
        total += delta
        if spec.heads == "mix":
            dmix += dmix_part
            space = _by_head(plan, maps, space)
        heads = _head_tensors(plan, maps, saved, space, delta)
        write_dq(call, plan.student, heads, space, dq)
        write_dk(call, plan.student, heads, space, dk, add=not whole)
    dsink = sink_gradient(p.sink_s, saved.lse_s, total, spec.temperature)
    return Gradients(dq, dk, dmix, dsink).like(problem)


# ------------------------------------------------------------------------------- pieces


def _anything(problem: Problem) -> bool:
    return problem.q_s.shape[0] > 0 and problem.q_s.shape[2] > 0 and problem.k_s.shape[2] > 0


def _plan(problem: Problem) -> Plan:
    """Build the lists, fold scale and temperature."""
    p, spec = problem, problem.spec
    sides = [x for x in (p.q_s, p.k_s, p.q_t, p.k_t) if x is not None]
    if len({x.dtype for x in sides}) > 1:
        dtype = torch.float32
    else:
        dtype = p.q_s.dtype
    lists = build_lists(
        p.positions,
        p.columns,
        p.segments,
        p.blocks,
        p.causal,
        p.window,
        exact=not _capturing(p.q_s.device),
    )
    student = _side(p.student(), dtype)
    teacher = None if p.q_t is None else _side(p.teacher(), dtype)
    call = Call(
        lists=lists,
        causal=p.causal,
        window=p.window,
        blocks=p.blocks is not None,
        heads=spec.heads,
        logs=spec.in_logs,
        scores=spec.normalize == "none",
        divergence=spec.divergence,
        groups=p.groups,
        batch=p.q_s.shape[0],
        rows=p.q_s.shape[2],
        dtype=dtype,
        device=p.q_s.device,
        wide=any(_reach(x) >= 2**31 for x in sides),
    )
    return Plan(p, call, student, teacher)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _reach(x: Tensor) -> int:
    """One past the largest offset inside one head of q or k."""
    return x.shape[2] * abs(x.stride(2)) + x.shape[3]


def _side(side: ModelSide, dtype: torch.dtype) -> Side:
    """q and k in one dtype with unit stride along D, and the factor from dot product to score."""
    q, k = (x.to(dtype) for x in (side.q, side.k))
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    spec = side.spec
    unit = 1 / spec.temperature
    if spec.normalize != "none":
        unit *= LOG2E
    elif spec.heads == "mean":
        unit /= side.heads
    if side.softcap:
        return Side(q, k, side.scale / side.softcap, side.softcap * unit, True)
    return Side(q, k, side.scale * unit, 1.0, False)


def _loss(problem: Problem, statistics: Tensor, weight: Tensor, entries: Tensor) -> Tensor:
    """The sum of the units' losses over their count."""
    return units_of(problem.spec, statistics, weight, entries).loss(problem.spec.divergence)


def _one_pass(problem: Problem) -> bool:
    """Whether the forward is the coupled online softmax: per-head KL between two models."""
    p, spec = problem, problem.spec
    return (
        (spec.heads, spec.divergence, spec.sink_sigma) == ("each", "kl", None)
        and spec.normalize in ("joint", "visual_per_head")
        and spec.compare != "pooled"
        and p.q_t is not None
        and p.lse_s is None
        and p.lse_t is None
    )


def _head_kl(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_s, lse_t, kl), each [B, H, R]."""
    p = plan.problem
    assert plan.teacher is not None
    sinks = [
        None if sink is None else sink.float() / p.spec.temperature for sink in (p.sink_s, p.sink_t)
    ]
    others = p.spec.sweeps_all_keys and plan.call.lists.others.count > 0
    out: tuple[Tensor, Tensor, Tensor]
    out = head_kl(plan.call, plan.student, plan.teacher, sinks[0], sinks[1], others)
    return out


def _log_sum_exps(plan: Plan, out: Forward) -> Forward:
    """``out`` with the log-sum-exps of both sides: given ones as they are, others from a sweep."""
    p = plan.problem
    if p.spec.normalize == "none":
        return out
    lse_s = _side_lse(plan, plan.student, p.lse_s, p.sink_s)
    lse_t = out.lse_t
    if plan.teacher is not None:
        lse_t = _side_lse(plan, plan.teacher, p.lse_t, p.sink_t)
    return out._replace(lse_s=lse_s, lse_t=lse_t)


def _side_lse(plan: Plan, side: Side, given: Tensor | None, sink: Tensor | None) -> Tensor:
    if given is not None:
        given = given.float()
        return torch.where(given == -math.inf, 0.0, given)
    spec, lists = plan.problem.spec, plan.call.lists
    if sink is not None:
        sink = sink.float() / spec.temperature
    keys = lists.every if spec.sweeps_all_keys else lists.compared
    lse: Tensor = row_lse(plan.call, side, keys, sink)
    return lse


def _map_tensors(plan: Plan, out: Forward) -> MapTensors:
    """What the maps are made of, normalisation and head shares folded into the log-sum-exps."""
    p = plan.problem
    lse_t = None if plan.teacher is None else _folded_lse(plan, plan.teacher, out.lse_t)
    target, mass = None, None
    if p.target is not None and p.spec.compare != "pooled":
        target = _dense_target(plan)
        if p.spec.normalize == "visual":
            _, mass = row_sums(plan.call, target)
    return MapTensors(
        student=plan.student,
        teacher=plan.teacher,
        lse_s=_folded_lse(plan, plan.student, out.lse_s),
        lse_t=lse_t,
        mix=None if p.mix is None else p.mix.detach().float().contiguous(),
        target=target,
        mass=mass,
        thresholds=None,
        visual=p.spec.normalize == "visual",
    )


def _folded_lse(plan: Plan, side: Side, lse: Tensor) -> Tensor:
    """[B, H, R] in log2: A = sum_h 2^(x_h - this)."""
    spec = plan.problem.spec
    if spec.normalize == "visual":
        over_columns = row_lse(plan.call, side, plan.call.lists.compared, None)
        if spec.heads == "each":
            lse = over_columns
        else:  # log H cancels against the mean's
            lse = lse + torch.logsumexp(over_columns - lse, 1, keepdim=True)
    elif spec.heads == "mean" and (spec.normalize != "none"):
        lse = lse + math.log(side.heads)
    return (lse * LOG2E).contiguous()


def _dense_target(plan: Plan) -> Tensor:
    """The given map as kernels read it; a sparse one is written out, [B, G, rows, columns]."""
    p = plan.problem
    target = p.target
    assert target is not None
    if p.target_index is not None:
        target = densify(target.float(), p.target_index, plan.call.lists.compared.count)
    return target if target.stride(-1) == 1 else target.contiguous()


def _sink_thresholds(plan: Plan, maps: MapTensors) -> Tensor:
    """[2, B, G]: mean + sigma std of every map."""
    p = plan.problem
    used, columns = p.positions >= 0, p.columns.sum(-1)
    moments = row_moments(plan.call, maps, columns.to(torch.int32))
    return torch.stack(
        [
            sink_threshold(total, centred, used.unsqueeze(1), used.sum(-1), columns, p.spec)
            for total, centred in moments
        ]
    )


def _pooled(plan: Plan, maps: MapTensors, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled [5, B, G, L], statistics [n, B, G, 1]) as the contract has them."""
    p, spec = plan.problem, plan.problem.spec
    sums = pooled_sums(plan.call, maps, weight.contiguous(), p.columns.shape[1])
    count = sums[2]
    kept = count > 0
    divisor = torch.where(kept, count, 1.0)
    if spec.in_logs:
        logs = torch.where(kept, sums[:2] - divisor.log(), 0.0)
        values = logs.exp() * kept
    else:
        values = sums[:2] / divisor
        logs = torch.zeros_like(values)
    a_t, log_t = values[1], logs[1]
    if p.target is not None:
        a_t, log_t = given_map(_pooled_target(p), spec, p.dtype)
    pooled = torch.stack([values[0], a_t, logs[0], log_t, count])
    a_s, a_t, log_s, log_t = (x.unsqueeze(2) for x in pooled[:4])
    return pooled, statistics_of(spec.divergence, a_s, a_t, log_s, log_t, kept.unsqueeze(2))


def _pooled_target(problem: Problem) -> Tensor:
    """A given pooled vector by position, [B, G, L]."""
    full = expand_target(problem)
    return full.to(problem.dtype)


def _pooled_upstream(
    problem: Problem, saved: Forward, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(gradient of the pooled vector or of its logarithm, sum of weights, its log), each [B, G, L]."""
    if problem.spec.compare != "pooled":
        return None
    a_s, a_t, log_s, log_t = (x.unsqueeze(2) for x in saved.pooled[:4])
    kept = (saved.pooled[4] > 0).unsqueeze(2)
    up = entry_gradient(problem.spec, a_s, a_t, log_s, log_t, kept, coefficients).squeeze(2)
    return up.contiguous(), saved.pooled[4].contiguous(), saved.pooled[2].contiguous()


def _chunks(plan: Plan) -> list[tuple[int, int]]:
    """Ranges of the row list whose head-free maps fit the workspace."""
    call, spec = plan.call, plan.problem.spec
    maps = call.groups * (2 if spec.in_logs else 1)
    if spec.heads == "mix":
        maps += plan.student.heads
    row_bytes = 4 * call.batch * maps * _pitch(plan)
    size = max(GRAIN, WORKSPACE_BYTES // row_bytes // GRAIN * GRAIN)
    count = call.lists.row_count
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _pitch(plan: Plan) -> int:
    return _whole(plan.call.lists.compared.count)


def _whole(count: int) -> int:
    """``count`` padded to whole tiles."""
    grain = int(GRAIN)
    return max(1, -(-count // grain)) * grain


def _workspace(plan: Plan, start: int, end: int) -> Workspace:
    call = plan.call
    shape = (call.batch, call.groups, _whole(end - start), _pitch(plan))
    # float16 looks for the largest entry (``_head_tensors``), so that none may be arbitrary
    make = torch.zeros if call.dtype == torch.float16 else torch.empty
    g = make(shape, dtype=torch.float32, device=call.device)
    return Workspace(g, torch.empty_like(g) if call.logs else None, start, end)


def _delta(plan: Plan, maps: MapTensors, space: Workspace) -> tuple[Tensor, Tensor]:
    """([B, H, R] sum_V X of every row and head, dmix or an empty tensor)."""
    call, spec, side = plan.call, plan.problem.spec, plan.student
    pairs = side.heads * (call.groups if spec.heads == "mix" else 1)
    delta = torch.zeros((call.batch, pairs, call.rows), dtype=torch.float32, device=call.device)
    if not call.scores or spec.heads == "mix":
        row_delta(call, side, maps.lse_s, space, delta)
    if spec.heads == "mix":
        assert maps.mix is not None
        by_pair = delta.view(call.batch, side.heads, call.groups, call.rows)
        return (by_pair * maps.mix[:, :, None]).sum(2), by_pair.sum((0, 3))
    return delta, delta.new_zeros((0,))


def _by_head(plan: Plan, maps: MapTensors, space: Workspace) -> Workspace:
    """For the learned mix: the gradient by each head's own map, sum_g mix[h, g] g_g."""
    assert maps.mix is not None
    return replace(space, g=torch.einsum("hg,bgrc->bhrc", maps.mix, space.g).contiguous())


def _head_tensors(
    plan: Plan, maps: MapTensors, saved: Forward, space: Workspace, delta: Tensor
) -> HeadTensors:
    """Row vectors of the student's heads; for float16, amplified to keep dS in its range.

    dS is rounded to the dtype of q and k for the second product. In float16 a gradient of a mean over
    many units would be lost below 6e-8; so P, and with it dS, is multiplied by a power of two that
    brings the largest g to 2^12, and the products are divided by it in fp32.
    """
    p, call = plan.problem, plan.call
    slope = p.scale_s / p.spec.temperature
    if call.scores and p.spec.heads == "mean":
        slope /= plan.student.heads
    factor = torch.full((), slope, dtype=torch.float32, device=call.device)
    lse, fold = saved.lse_s * LOG2E, maps.lse_s
    if call.dtype == torch.float16:
        largest = space.g.abs().amax()
        power = 12 - torch.where(largest > 0, largest, 1.0).log2().ceil()
        lse, fold = lse - power, fold - power
        if call.scores or (call.logs and call.heads == "each"):  # no P is a factor of it
            space.g.mul_(power.exp2())
        factor = factor * (-power).exp2()
    if p.spec.heads == "mean" and not p.spec.in_logs:  # P carries its share 1 / H in the kernels
        delta = delta * plan.student.heads
    return HeadTensors(
        lse=lse.contiguous(),
        fold=fold.contiguous(),
        delta=delta.contiguous(),
        slope=factor,
        each=p.spec.heads != "mean",
        others=p.spec.sweeps_all_keys and call.lists.others.count > 0,
    )
