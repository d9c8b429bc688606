"""The streaming backend in plain torch: any device, any spec, nothing of size heads x rows x columns.

One sample at a time, one block of query rows at a time, the heads of a block in chunks: scores of a
chunk live in a tile of at most ``TILE_BYTES``; what stays of a block are its head-free maps
[G, rows, columns], which are reduced to a few numbers a row before the next block begins. The backward
recomputes the maps with the log-sum-exps of the forward and applies the analytic gradient
(``gradients.py``). Key ranges that no row of a block can see are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients import (
    entry_gradient,
    row_coefficients,
    sink_gradient,
    through_pooling,
    through_renormalisation,
)
from ..maths import (
    densify,
    given_map,
    row_statistics,
    row_weights,
    sink_threshold,
    units_of,
)
from ..problem import Problem, Side
from ..select import Sample, Visibility, select_sample
from .contract import Forward, Gradients, empty_forward

#: The whole workspace of a call, and the share of it that one tile of scores may take: a handful of
#: tiles is alive at once (scores, an exponential of them, their gradient, the maps).
WORKSPACE_BYTES = 64 * 2**20
TILE_BYTES = WORKSPACE_BYTES // 16
#: Fewer rows than this make poor matrix products; then heads are taken in chunks instead.
MIN_ROWS = 32
MAX_ROWS = 256

Index = slice | Tensor


@dataclass(frozen=True)
class KeySet:
    """The keys that a sweep visits: where they are, what is hidden, which are compared columns."""

    index: Index  # into the sequence
    hidden: Tensor | None  # [I, K] bool; None: every row sees every key of the set
    columns: Index  # the block's compared columns among the K keys


@dataclass(frozen=True)
class Block:
    """A block of query rows of one sample with the keys that it can see, and a range of groups."""

    b: int
    rows: Index  # [I] into the query rows
    ordinals: Tensor  # [I] among the selected rows
    weight: Tensor  # [I]
    every: KeySet  # every visible key
    compared: KeySet  # compared columns only
    visible: Tensor  # [I, C] compared columns that each row sees
    columns: Tensor  # [C] positions of the compared columns in reach
    first_column: int  # ordinal of the first of them
    groups: slice

    def heads(self, side: Side) -> range:
        """The heads of this side that the block's groups need."""
        if side.spec.heads == "each":
            return range(self.groups.start, self.groups.stop)
        return range(side.heads)


@dataclass(frozen=True)
class Maps:
    """The compared maps of a block, [G, I, C], normalised; keep [G or 1, I, C] is what is compared."""

    a_s: Tensor
    a_t: Tensor
    log_s: Tensor
    log_t: Tensor
    keep: Tensor
    raw_log_s: Tensor  # log A_s before renormalisation, for the chain to the heads


def unsupported(problem: Problem) -> str | None:
    """Nothing: this backend takes every problem."""
    return None


# --------------------------------------------------------------------------- forward


def forward(problem: Problem) -> Forward:
    """The loss, and the statistics that ``backward`` needs."""
    out = empty_forward(problem)
    spec, weight = problem.spec, row_weights(problem)
    known = _adopt_given_lse(problem, out)
    if spec.sink_sigma is not None:
        _sink_thresholds(problem, weight, out, known)
        known = (True, True)
    for sample, visibility, b in _samples(problem):
        for block in _blocks(problem, sample, visibility, b, weight):
            maps = _maps(problem, block, out, known)
            out.entries[b, block.rows] = block.visible.sum(-1).to(out.entries.dtype)
            if spec.compare == "pooled":
                _pool_block(problem, block, maps, out.pooled[:, b, block.groups])
            else:
                statistics = row_statistics(
                    spec.divergence, maps.a_s, maps.a_t, maps.log_s, maps.log_t, maps.keep
                )
                out.statistics[:, b, block.groups, block.rows] = statistics
        if spec.compare == "pooled":
            _finish_pooling(problem, sample, b, out)
    units = units_of(spec, out.statistics, weight, out.entries)
    return out._replace(loss=units.loss(spec.divergence))


def _adopt_given_lse(problem: Problem, out: Forward) -> tuple[bool, bool]:
    """Copy log-sum-exps that the caller has; says for which side (student, teacher) there are some."""
    for given, lse in ((problem.lse_s, out.lse_s), (problem.lse_t, out.lse_t)):
        if given is not None:
            lse.copy_(given.to(lse.dtype).masked_fill(given == -math.inf, 0.0))
    return problem.lse_s is not None, problem.lse_t is not None


def _sink_thresholds(
    problem: Problem, weight: Tensor, out: Forward, known: tuple[bool, bool]
) -> None:
    """First sweep of the sink filter: mean + sigma std of every map, from moments of its rows."""
    used = problem.positions >= 0
    moments = weight.new_zeros(2, 2, problem.groups, used.shape[1])
    for sample, visibility, b in _samples(problem):
        moments.zero_()
        for block in _blocks(problem, sample, visibility, b, weight):
            maps = _maps(problem, block, out, known, filtered=False)
            width, beyond = len(sample.columns), len(sample.columns) - len(block.columns)
            for side, a in enumerate((maps.a_s, maps.a_t)):
                total = a.sum(-1)
                mean = total / width
                centred = (a - mean.unsqueeze(-1)).square().sum(-1) + beyond * mean.square()
                moments[side, 0, block.groups, block.rows] = total
                moments[side, 1, block.groups, block.rows] = centred
        rows, columns = used[b : b + 1].sum(-1), problem.columns[b : b + 1].sum(-1)
        for side in range(2):
            total, centred = moments[side].unsqueeze(1)
            out.thresholds[side, b] = sink_threshold(
                total, centred, used[b].view(1, 1, -1), rows, columns, problem.spec
            )[0]


def _pool_block(problem: Problem, block: Block, maps: Maps, pooled: Tensor) -> None:
    """Add a block's rows to the running sums over rows; pooled: [5, G, L] view of one sample."""
    spec, columns = problem.spec, block.columns
    w = block.weight.view(1, -1, 1) * maps.keep  # [G, I, C]
    count = w.sum(1)
    if not spec.in_logs:
        pooled[0, :, columns] += (w * maps.a_s).sum(1)
        pooled[1, :, columns] += (w * maps.a_t).sum(1)
    else:
        before = pooled[4, :, columns] > 0
        for log, log_a in ((2, maps.log_s), (3, maps.log_t)):
            terms = (log_a + w.log()).masked_fill(w <= 0, -math.inf)
            total = torch.where(before, pooled[log, :, columns], -math.inf)
            total = torch.logaddexp(total, terms.logsumexp(1))
            pooled[log, :, columns] = torch.where(before | (count > 0), total, 0.0)
    pooled[4, :, columns] += count


def _finish_pooling(problem: Problem, sample: Sample, b: int, out: Forward) -> None:
    """Divide the sums over rows by their weights and take the statistics of the pooled vectors."""
    spec, pooled = problem.spec, out.pooled[:, b]
    count = pooled[4]
    kept = count > 0
    divisor = torch.where(kept, count, 1.0)
    if spec.in_logs:
        pooled[2:4] = torch.where(kept, pooled[2:4] - divisor.log(), 0.0)
        pooled[0:2] = pooled[2:4].exp() * kept
    else:
        pooled[0:2] /= divisor
    if problem.target is not None:
        target = _given_rows(problem, b, slice(None), None, len(sample.columns))
        a_t, log_t = given_map(target, spec, problem.dtype)
        pooled[1, :, sample.columns], pooled[3, :, sample.columns] = a_t, log_t
    a_s, a_t, log_s, log_t = pooled[:4].unsqueeze(2)
    statistics = row_statistics(spec.divergence, a_s, a_t, log_s, log_t, kept.unsqueeze(1))
    out.statistics[:, b] = statistics


# -------------------------------------------------------------------------- backward


def backward(problem: Problem, saved: Forward, grad: Tensor) -> Gradients:
    """Gradients of the student for the upstream gradient ``grad`` (scalar)."""
    spec, dtype = problem.spec, problem.dtype
    q, k = problem.q_s, problem.k_s
    weight = row_weights(problem)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    dmix = torch.zeros(
        problem.mix.shape if problem.mix is not None else (0,), dtype=dtype, device=q.device
    )
    delta = torch.zeros_like(saved.lse_s)
    units = units_of(spec, saved.statistics, weight, saved.entries)
    coefficients = row_coefficients(spec, units, grad)
    for sample, visibility, b in _samples(problem):
        # summed over row blocks in the arithmetic's precision; in place where that is k's own
        exact = k.dtype == dtype
        dk_sample = dk[b] if exact else torch.zeros(k.shape[1:], dtype=dtype, device=k.device)
        pooled = _pooled_gradient(problem, saved, b, coefficients)
        for block in _blocks(problem, sample, visibility, b, weight):
            maps = _maps(problem, block, saved, (True, True))
            if pooled is None:
                c = coefficients[:, b, block.groups, block.rows]
                gradient = entry_gradient(
                    spec, maps.a_s, maps.a_t, maps.log_s, maps.log_t, maps.keep, c
                )
            else:
                gradient = through_pooling(
                    pooled[block.groups][:, block.columns],
                    maps.keep,
                    block.weight,
                    saved.pooled[4, b, block.groups][:, block.columns],
                    maps.log_s if spec.in_logs else None,
                    saved.pooled[2, b, block.groups][:, block.columns],
                )
            if spec.normalize == "visual":
                gradient = through_renormalisation(gradient, maps.a_s)
            _heads_backward(problem, block, maps, gradient, saved.lse_s, dq, dk_sample, dmix, delta)
        if not exact:
            dk[b] = dk_sample.to(k.dtype)
    dsink = sink_gradient(problem.sink_s, saved.lse_s, delta, spec.temperature)
    return Gradients(dq, dk, dmix, dsink).like(problem)


def _pooled_gradient(
    problem: Problem, saved: Forward, b: int, coefficients: Tensor
) -> Tensor | None:
    """dL / d pooled student vector (or its logarithm), [G, L]; None if rows are not pooled."""
    if problem.spec.compare != "pooled":
        return None
    a_s, a_t, log_s, log_t = saved.pooled[:4, b].unsqueeze(2)
    kept = (saved.pooled[4, b] > 0).unsqueeze(1)
    spec = problem.spec
    return entry_gradient(spec, a_s, a_t, log_s, log_t, kept, coefficients[:, b]).squeeze(1)


def _heads_backward(
    problem: Problem,
    block: Block,
    maps: Maps,
    gradient: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dmix: Tensor,
    delta: Tensor,
) -> None:
    """dS = X - P sum_V X of every head of a block (``gradients.py``), and with it dq and dk.

    Args:
        gradient: [G, I, C] dL/dA_s, or dL/d log A_s for maps in logs.
        lse: [B, H, R]. dq: [B, H, R, D] and dmix [H, G], written to. dk: [K, L, D], added to.
        delta: [B, H, R], sum_V X, added to.
    """
    spec, side = problem.spec, problem.student()
    keys = block.every if spec.sweeps_all_keys else block.compared
    for heads in _chunks(block.heads(side), side.repeat, _room(problem, block, keys)):
        s = _scores(side, block, keys, heads, problem.dtype)
        factor = side.scale / spec.temperature
        slope = None
        if side.softcap:  # d cap tanh(x / cap) / dx, from the capped score
            slope = 1 - (s * (spec.temperature / side.softcap)).square().clamp(max=1)
        if spec.normalize == "none":
            p = s
        else:
            s -= lse[block.b, heads.start : heads.stop, block.rows].unsqueeze(-1)
            p = s.exp()
        seen = p[..., keys.columns]
        if spec.heads == "mix":
            assert problem.mix is not None
            mix = problem.mix[heads.start : heads.stop].to(problem.dtype)
            dmix[heads.start : heads.stop] += torch.einsum(
                "hic,gic->hg", seen.masked_fill(~block.visible, 0.0), gradient
            )
            by_head = torch.einsum("hg,gic->hic", mix, gradient)
        else:
            by_head = gradient if spec.heads == "each" else gradient / side.heads
            if spec.heads == "each":
                start = block.groups.start
                by_head = gradient[heads.start - start : heads.stop - start]
        if spec.normalize == "none":
            ds = by_head.expand(len(heads), -1, -1).clone()
        else:
            if spec.in_logs:
                log_a = maps.raw_log_s
                if spec.heads == "each":
                    start = block.groups.start
                    log_a = log_a[heads.start - start : heads.stop - start]
                share = s[..., keys.columns] - log_a  # log P_h - log A, at most log H
                share = share.masked_fill(~block.visible, -math.inf).exp()
                x = share * by_head
            else:
                x = seen * by_head
            total = x.sum(-1)
            delta[block.b, heads.start : heads.stop, block.rows] += total
            ds = p.mul_(-total.unsqueeze(-1))
            ds[..., keys.columns] += x
        if slope is not None:
            ds *= slope
        ds *= factor
        _write_head_gradients(side, block, keys, heads, ds, dq, dk)


def _write_head_gradients(
    side: Side, block: Block, keys: KeySet, heads: range, ds: Tensor, dq: Tensor, dk: Tensor
) -> None:
    """dq = dS k, dk += dS^T q for the heads of a chunk; ds: [h, I, K] with the scale in it."""
    kv = _key_heads(heads, side.repeat)
    share = len(heads) // len(kv)
    ds = ds.view(len(kv), share * ds.shape[1], ds.shape[2])
    k = side.k[block.b, kv.start : kv.stop][:, keys.index].to(ds.dtype)
    q = side.q[block.b, heads.start : heads.stop][:, block.rows].to(ds.dtype)
    dq_block = torch.bmm(ds, k).view(q.shape)
    dq[block.b, heads.start : heads.stop, block.rows] = dq_block.to(dq.dtype)
    dk_block = torch.bmm(ds.transpose(1, 2), q.reshape(len(kv), -1, q.shape[-1]))
    if isinstance(keys.index, slice):
        dk[kv.start : kv.stop, keys.index] += dk_block
    else:
        dk[kv.start : kv.stop].index_add_(1, keys.index, dk_block)


# ------------------------------------------------------------------------ maps of a block


def _maps(
    problem: Problem, block: Block, out: Forward, known: tuple[bool, bool], filtered: bool = True
) -> Maps:
    """The compared maps of a block.

    Log-sum-exps of a side that are not ``known`` yet (student, teacher) are written to ``out``. With
    both known the sweep is the same in the forward and in the backward, bit for bit, which is what
    makes the sink filter's mask of the one the mask of the other.
    """
    spec, dtype = problem.spec, problem.dtype
    a_s, log_s = _side_map(problem, problem.student(), block, out.lse_s, known[0], problem.mix)
    raw_log_s = log_s
    if problem.target is None:
        a_t, log_t = _side_map(problem, problem.teacher(), block, out.lse_t, known[1], None)
    elif spec.compare == "pooled":
        a_t, log_t = torch.zeros_like(a_s), torch.zeros_like(a_s)
    else:
        columns = slice(block.first_column, block.first_column + len(block.columns))
        full = _given_rows(
            problem, block.b, block.groups, block.ordinals, int(problem.columns[block.b].sum())
        )
        target = full[..., columns] * block.visible
        a_t, log_t = given_map(target, spec, dtype)
    if spec.normalize == "visual":
        a_s, log_s = _renormalise(log_s, block.visible)
        if problem.target is None:
            a_t, log_t = _renormalise(log_t, block.visible)
    keep = block.visible.unsqueeze(0)
    if spec.sink_sigma is not None and filtered:
        low_s, low_t = out.thresholds[:, block.b, block.groups, None, None]
        keep = keep & (a_s <= low_s) & (a_t <= low_t) & (a_t != 0)
    return Maps(a_s, a_t, log_s, log_t, keep, raw_log_s)


def _side_map(
    problem: Problem, side: Side, block: Block, lse: Tensor, known: bool, mix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(A, log A) of one side, [G, I, C], 0 where hidden; fills lse [B, H, R] unless it is known."""
    spec, dtype = problem.spec, problem.dtype
    heads_all = block.heads(side)
    shape = (len(range(*block.groups.indices(problem.groups))), *block.visible.shape)
    maps = torch.zeros(shape, dtype=dtype, device=lse.device)
    if spec.in_logs and spec.heads == "mean":
        maps.fill_(-math.inf)
    hidden = ~block.visible
    keys = block.compared if known or not spec.sweeps_all_keys else block.every
    for heads in _chunks(heads_all, side.repeat, _room(problem, block, keys)):
        s = _scores(side, block, keys, heads, dtype)
        if spec.normalize != "none":
            place = (block.b, slice(heads.start, heads.stop), block.rows)
            if not known:
                lse[place] = _log_sum_exp(side, s, heads)
            s -= lse[place].unsqueeze(-1)
        s = s[..., keys.columns]
        if spec.in_logs:
            if spec.heads == "mean":
                torch.logaddexp(maps[0], s.logsumexp(0), out=maps[0])
            else:
                first = heads.start - block.groups.start
                maps[first : first + len(heads)] = s
            continue
        p = (s.exp() if spec.normalize != "none" else s).masked_fill(hidden, 0.0)
        if mix is not None:
            weights = mix[heads.start : heads.stop].to(dtype)
            maps += torch.einsum("hic,hg->gic", p, weights)
        elif spec.heads == "mean":
            maps[0] += p.sum(0)
        else:
            first = heads.start - block.groups.start
            maps[first : first + len(heads)] = p
    if spec.in_logs:
        if spec.heads == "mean":
            maps -= math.log(side.heads)
        maps.masked_fill_(hidden, 0.0)
        return maps.exp().masked_fill_(hidden, 0.0), maps
    if spec.heads == "mean":
        maps /= side.heads
    return maps, maps


def _log_sum_exp(side: Side, s: Tensor, heads: range) -> Tensor:
    """[h, I] over the keys of s [h, I, K], with the head's sink; 0 for rows that see nothing."""
    lse = s.logsumexp(-1)
    if side.sink is not None:
        sink = side.sink[heads.start : heads.stop].to(s.dtype) / side.spec.temperature
        lse = torch.logaddexp(lse, sink.unsqueeze(-1))
    return lse.masked_fill(lse == -math.inf, 0.0)


def _renormalise(log_a: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(A, log A) divided by the sum over the visible columns; 0 where hidden."""
    mass = log_a.masked_fill(~visible, -math.inf).logsumexp(-1, keepdim=True)
    log_a = torch.where(visible, log_a - mass, 0.0)
    return log_a.exp().masked_fill_(~visible, 0.0), log_a


def _given_rows(
    problem: Problem, b: int, groups: slice, ordinals: Tensor | None, width: int
) -> Tensor:
    """Rows of the given map of one sample as dense [G, I, C] (pooled: [G, C])."""
    assert problem.target is not None
    values, index = problem.target[b, groups], problem.target_index
    if ordinals is not None:
        values = values[:, ordinals]
    if index is None:
        return values[..., :width].to(problem.dtype)
    index = index[b, groups] if ordinals is None else index[b, groups][:, ordinals]
    return densify(values.to(problem.dtype), index, width)


def _scores(side: Side, block: Block, keys: KeySet, heads: range, dtype: torch.dtype) -> Tensor:
    """S [h, I, K] of a chunk of heads; -inf where hidden (0 for normalize="none")."""
    kv = _key_heads(heads, side.repeat)
    q = side.q[block.b, heads.start : heads.stop][:, block.rows].to(dtype)
    k = side.k[block.b, kv.start : kv.stop][:, keys.index].to(dtype)
    s = torch.bmm(q.reshape(len(kv), -1, q.shape[-1]), k.transpose(1, 2))
    s = s.view(len(heads), q.shape[1], k.shape[1])
    s *= side.scale
    if side.softcap:
        s = s.div_(side.softcap).tanh_().mul_(side.softcap)
    s /= side.spec.temperature
    if keys.hidden is not None:
        s.masked_fill_(keys.hidden, 0.0 if side.spec.normalize == "none" else -math.inf)
    return s


# --------------------------------------------------------------------------------- tiles


def _samples(problem: Problem) -> Iterator[tuple[Sample, Visibility, int]]:
    """The samples that have rows and columns to compare."""
    for b in range(problem.q_s.shape[0]):
        visibility = problem.visibility.sample(b)
        sample = select_sample(problem.positions[b], problem.columns[b], visibility)
        if len(sample.rows) and len(sample.columns):
            yield sample, visibility, b


def _blocks(
    problem: Problem, sample: Sample, visibility: Visibility, b: int, weight: Tensor
) -> Iterator[Block]:
    """Blocks of rows with the keys they can see; those that see no compared column are left out."""
    width = int((sample.hi.max() - sample.lo.min()).clamp(min=1))
    if not problem.spec.sweeps_all_keys:
        width = len(sample.columns)
    size, group_size = _tile_shape(problem, width)
    for rows in range(0, len(sample.rows), size):
        part = slice(rows, rows + size)
        lo, hi = int(sample.lo[part].min()), int(sample.hi[part].max())
        first, last = torch.searchsorted(sample.columns, sample.columns.new_tensor([lo, hi]))
        columns = sample.columns[int(first) : int(last)]
        if not len(columns):
            continue
        every, compared, visible = _key_sets(
            problem, visibility, sample.positions[part], columns, lo, hi
        )
        for group in range(0, problem.groups, group_size):
            yield Block(
                b=b,
                rows=_as_slice(sample.rows[part]),
                ordinals=sample.ordinals[part],
                weight=weight[b, sample.rows[part]],
                every=every,
                compared=compared,
                visible=visible,
                columns=columns,
                first_column=int(first),
                groups=slice(group, min(group + group_size, problem.groups)),
            )


def _key_sets(
    problem: Problem, visibility: Visibility, rows: Tensor, columns: Tensor, lo: int, hi: int
) -> tuple[KeySet, KeySet, Tensor]:
    """(every key in [lo, hi), the compared columns alone, [I, C] which of these a row sees)."""
    if problem.spec.sweeps_all_keys:
        seen = visibility.visible(rows, torch.arange(lo, hi, device=rows.device))
        visible = seen[:, columns - lo]
        every = KeySet(slice(lo, hi), _hidden(seen), _as_slice(columns - lo))
    else:
        visible = visibility.visible(rows, columns)
        every = KeySet(_as_slice(columns), _hidden(visible), slice(None))
    return every, KeySet(_as_slice(columns), _hidden(visible), slice(None)), visible


def _tile_shape(problem: Problem, width: int) -> tuple[int, int]:
    """(rows, groups) of a block whose widest tile keeps to ``TILE_BYTES``."""
    room = max(1, TILE_BYTES // (width * _itemsize(problem.dtype)))  # rows x heads
    if problem.spec.heads == "each":
        groups = max(1, min(problem.groups, room // MIN_ROWS))
        return max(1, min(MAX_ROWS, room // groups)), groups
    heads = problem.q_s.shape[1] if problem.q_t is None else problem.q_t.shape[1]
    heads = max(heads, problem.q_s.shape[1])
    if problem.spec.heads == "mix" or room // heads >= MIN_ROWS:
        return max(1, min(MAX_ROWS, room // heads)), problem.groups
    return max(1, min(2 * MIN_ROWS, room)), problem.groups


def _room(problem: Problem, block: Block, keys: KeySet) -> int:
    """How many heads' scores of this block fit a tile."""
    rows = len(block.ordinals)
    width = (
        (keys.index.stop - keys.index.start) if isinstance(keys.index, slice) else len(keys.index)
    )
    return max(1, TILE_BYTES // max(1, rows * width * _itemsize(problem.dtype)))


def _chunks(heads: range, repeat: int, room: int) -> Iterator[range]:
    """Cut a range of heads into chunks of at most ``room``: whole key-head groups, or part of one."""
    head = heads.start
    while head < heads.stop:
        boundary = repeat - head % repeat
        if boundary == repeat and min(room, heads.stop - head) >= repeat:
            size = min(room, heads.stop - head) // repeat * repeat
        else:
            size = min(room, boundary, heads.stop - head)
        yield range(head, head + size)
        head += size


def _key_heads(heads: range, repeat: int) -> range:
    """The key heads that a chunk of ``_chunks`` reads."""
    return range(heads.start // repeat, (heads.stop - 1) // repeat + 1)


def _hidden(visible: Tensor) -> Tensor | None:
    return None if bool(visible.all()) else ~visible


def _as_slice(index: Tensor) -> Index:
    """A run of consecutive indices as a slice, so that no gather copies the data."""
    if len(index) and int(index[-1]) - int(index[0]) + 1 == len(index):
        start = int(index[0])
        if bool((index[1:] > index[:-1]).all()):
            return slice(start, start + len(index))
    return index


def _itemsize(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
