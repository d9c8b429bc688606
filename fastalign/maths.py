r"""The definition: what the loss is, materialised in plain torch, differentiated by torch.

Everything else in this package is an optimisation of this file and is tested against it in float64.
It holds heads x rows x columns of weights and is meant to be read, not to be fast.

For one sample, ``i`` a query row, ``j`` a key, ``N(i)`` the keys that the softmax of row i runs over and
``V`` the compared columns that row i sees:

    S_h   = scale q_h k^T / temperature                      scores (softcap before the temperature)
    LSE_h = log sum_{j in N(i)} exp S_h[i, j]                (a sink logit joins the sum)
    P_h   = exp(S_h - LSE_h)
    A_g   = sum_h w_gh P_h on V                              the map of group g
    A_g   <- A_g / sum_V A_g                                 normalize="visual" only

A *unit* (a whole map, a row, or a map pooled over rows) of the student is compared with the teacher's,
and the loss is the sum over units, divided once by their count for ``reduction="mean"``.

Units are counted only where there is something to compare: a sample with at least one row that sees
at least one compared column (``map``, ``pooled``), such a row (``row``; a weighted row counts as its
weight). With no unit the loss is exactly 0 and so are its gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .problem import Problem, Side
from .spec import AlignSpec


def align_loss(problem: Problem) -> Tensor:
    """The loss of one problem (scalar, ``problem.dtype``), differentiable in q_s, k_s, mix, sink_s."""
    spec, dtype = problem.spec, problem.dtype
    visible = problem.visibility.full(problem.positions)  # [B, R, L]
    compared = (visible & problem.columns.unsqueeze(1)).unsqueeze(1)  # [B, 1, R, L]
    keys = visible if spec.sweeps_all_keys else compared.squeeze(1)
    weight = row_weights(problem)  # [B, R], 0 where the row is not compared
    entries = compared.sum(-1).squeeze(1)  # [B, R]

    a_s, log_s = group_map(problem.student(), keys, compared, problem.mix, dtype)
    a_t, log_t = _teacher_map(problem, keys, compared)
    if spec.normalize == "visual":
        a_s, log_s = renormalise(log_s, compared)
    keep = compared.expand_as(a_s)
    if spec.sink_sigma is not None:
        keep = keep & below_sinks(problem, a_s.detach(), a_t)
    if spec.compare == "pooled":
        a_s, log_s, kept = pool(a_s, log_s, keep, weight, spec.in_logs)
        if problem.target is not None:
            a_t, log_t = given_map(expand_target(problem).unsqueeze(2), spec, dtype)
        else:
            a_t, log_t, _ = pool(a_t, log_t, keep, weight, spec.in_logs)
        keep = kept

    statistics = row_statistics(spec.divergence, a_s, a_t, log_s, log_t, keep)
    return units_of(spec, statistics, weight, entries).loss(spec.divergence)


def _teacher_map(problem: Problem, keys: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """(A_t, log A_t) [B, G, R, L], normalised; from the teacher's q and k or from the given map."""
    spec, dtype = problem.spec, problem.dtype
    if problem.target is None:
        a, log_a = group_map(problem.teacher(), keys, compared, None, dtype)
        if spec.normalize == "visual":
            a, log_a = renormalise(log_a, compared)
        return a.detach(), log_a.detach()
    if spec.compare == "pooled":  # takes its place after the student's map is pooled
        nothing = compared.new_zeros((), dtype=dtype)
        return nothing, nothing
    return given_map(expand_target(problem) * compared, spec, dtype)


# ------------------------------------------------------------------------------ maps


def scores(side: Side, dtype: torch.dtype) -> Tensor:
    """S [B, H, R, L]: scaled, capped, divided by the temperature."""
    k = side.k.to(dtype).repeat_interleave(side.repeat, dim=1)
    s = side.q.to(dtype) @ k.transpose(-1, -2) * side.scale
    if side.softcap:
        s = side.softcap * torch.tanh(s / side.softcap)
    return s / side.spec.temperature


def log_probabilities(side: Side, s: Tensor, keys: Tensor) -> Tensor:
    """log P_h [B, H, R, L] over ``keys`` [B, R, L]; -inf elsewhere and in rows that see no key.

    A given LSE is a value that somebody else computed: it replaces the number, not the derivative.
    """
    keys = keys.unsqueeze(1)
    alive = keys.any(-1, keepdim=True)
    masked = s.masked_fill(~keys, -math.inf).masked_fill(~alive, 0.0)
    lse = torch.logsumexp(masked, -1, keepdim=True)
    if side.sink is not None:
        sink = side.sink.to(s.dtype).view(1, -1, 1, 1) / side.spec.temperature
        lse = torch.logaddexp(lse, sink)
    if side.lse is not None:
        given = side.lse.to(s.dtype).unsqueeze(-1)
        lse = lse + (torch.where(alive, given, lse) - lse).detach()
    return (masked - lse).masked_fill(~(keys & alive), -math.inf)


def group_map(
    side: Side, keys: Tensor, compared: Tensor, mix: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, log A), each [B, G, R, L] and 0 outside ``compared`` [B, 1, R, L].

    log A is accumulated from S - LSE, never taken of a rounded A; it is 0 when the spec needs none.
    """
    spec = side.spec
    s = scores(side, dtype)
    if spec.normalize == "none":
        maps = s.masked_fill(~compared, 0.0)
    else:
        log_p = log_probabilities(side, s, keys)
        if spec.in_logs:
            log_p = log_p.masked_fill(~compared, 0.0)
            if spec.heads == "mean":
                log_p = torch.logsumexp(log_p, 1, keepdim=True) - math.log(side.heads)
            return log_p.exp() * compared, log_p * compared
        maps = log_p.exp() * compared
    if spec.heads == "mean":
        maps = maps.mean(1, keepdim=True)
    elif mix is not None:
        maps = torch.einsum("bhij,hg->bgij", maps, mix.to(dtype))
    return maps, torch.zeros_like(maps)


def renormalise(log_a: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """(A / sum_V A, its log); rows without a compared column stay 0."""
    alive = compared.any(-1, keepdim=True)
    masked = log_a.masked_fill(~compared, -math.inf).masked_fill(~alive, 0.0)
    log_a = torch.where(compared, log_a - torch.logsumexp(masked, -1, keepdim=True), 0.0)
    return log_a.exp() * compared, log_a


def given_map(target: Tensor, spec: AlignSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, log A) of a given map, without gradient; ``normalize="visual"`` divides by its sum.

    In the logarithm an entry of exactly 0 counts as the smallest normal number. It has no influence on
    kl and js (the entry's weight is 0); it keeps reverse_kl, infinite by definition where the student
    looks and the target says never, finite and steep. A row of zeros stays a row of zeros.
    """
    a = target.detach().to(dtype)
    if spec.normalize == "visual":
        mass = a.sum(-1, keepdim=True)
        a = torch.where(mass > 0, a / torch.where(mass > 0, mass, 1.0), 0.0)
    log_a = a.clamp(min=torch.finfo(dtype).tiny).log() if spec.in_logs else torch.zeros_like(a)
    return a, log_a


def below_sinks(problem: Problem, a_s: Tensor, a_t: Tensor) -> Tensor:
    """Where both maps are at most mean + sigma std and the teacher's is not 0: [B, G, R, L]."""
    rows = (problem.positions >= 0).sum(-1)
    columns = problem.columns.sum(-1)
    keep = a_t != 0
    for a in (a_s, a_t):
        inside = problem.columns[:, None, None, :]
        total = a.sum(-1)
        mean = total / columns.clamp(min=1)[:, None, None]
        centred = ((a - mean.unsqueeze(-1)).square() * inside).sum(-1)
        used = (problem.positions >= 0).unsqueeze(1)
        threshold = sink_threshold(total * used, centred * used, used, rows, columns, problem.spec)
        keep = keep & (a <= threshold[:, :, None, None])
    return keep


def sink_threshold(
    total: Tensor, centred: Tensor, used: Tensor, rows: Tensor, columns: Tensor, spec: AlignSpec
) -> Tensor:
    """mean + sigma * unbiased std of each map, [B, G], over rows x columns, zeros included.

    Args:
        total: [B, G, R] sum of each row. centred: [B, G, R] its squared deviations from its own mean.
        used: [B, 1, R] bool. rows, columns: [B] sizes of the map.
    """
    assert spec.sink_sigma is not None
    width = columns.to(total.dtype)[:, None]
    size = (rows * columns).to(total.dtype)[:, None]
    mean = total.sum(-1) / size.clamp(min=1)
    offset = total / width.clamp(min=1).unsqueeze(-1) - mean.unsqueeze(-1)
    between = (offset.square() * used).sum(-1) * width
    variance = (centred.sum(-1) + between) / (size - 1).clamp(min=1)
    return mean + spec.sink_sigma * variance.sqrt()


def pool(
    a: Tensor, log_a: Tensor, keep: Tensor, weight: Tensor, in_logs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean over the rows that keep a column: (A, log A, kept), each [B, G, 1, L].

    The divisor is max(1, sum of weights) as in the released code; with unit weights it only ever acts
    where nothing is kept, and there the pooled value is 0.
    """
    w = weight[:, None, :, None] * keep
    count = w.sum(2, keepdim=True)
    kept = count > 0
    divisor = torch.where(kept, count, 1.0)
    if not in_logs:
        return (a * w).sum(2, keepdim=True) / divisor, torch.zeros_like(divisor), kept
    log_w = torch.where(w > 0, w, 1.0).log()
    terms = torch.where(w > 0, log_a + log_w, -math.inf).masked_fill(~kept, 0.0)
    pooled = torch.where(kept, torch.logsumexp(terms, 2, keepdim=True) - divisor.log(), 0.0)
    return pooled.exp() * kept, pooled, kept


# ------------------------------------------------------------------------- divergences


def row_statistics(
    divergence: str, a_s: Tensor, a_t: Tensor, log_s: Tensor, log_t: Tensor, keep: Tensor
) -> Tensor:
    """What each row contributes to its unit: [n, ...], the last axis summed over ``keep``.

    cosine: (sum st, sum s^2, sum t^2). Otherwise one number, the divergence itself:
    kl sum t(log t - log s); reverse_kl sum s(log s - log t);
    js sum t(log t - log m)/2 + s(log s - log m)/2 with m = (s + t)/2; mse sum (s - t)^2.
    """
    if divergence == "cosine":
        terms = [a_s * a_t, a_s * a_s, a_t * a_t]
    elif divergence == "kl":
        terms = [a_t * (log_t - log_s)]
    elif divergence == "reverse_kl":
        terms = [a_s * (log_s - log_t)]
    elif divergence == "js":
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        terms = [0.5 * (a_t * (log_t - log_m) + a_s * (log_s - log_m))]
    else:
        terms = [(a_s - a_t).square()]
    return torch.stack([torch.where(keep, term, 0.0).sum(-1) for term in terms])


@dataclass(frozen=True)
class Units:
    """What is compared, one number each: U units a sample and group.

    Attributes:
        statistics: [n, B, G, U] of ``row_statistics``: of a whole map or a pooled vector (U = 1), or of
            each row (U = R).
        weight: [B, 1, U] with which a unit counts; 0 where there is nothing to compare.
        rows: [B, 1, R] with which a row enters its unit (pooled vectors: ``weight``).
        count: scalar, what the sum of losses is divided by; 1 where there is no unit, so that the loss
            is 0, not 0/0.
    """

    statistics: Tensor
    weight: Tensor
    rows: Tensor
    count: Tensor

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """``usable_norms`` of the units (cosine only)."""
        return usable_norms(self.statistics)

    def loss(self, divergence: str) -> Tensor:
        """The sum of the units' losses over their count."""
        if divergence == "cosine":
            usable, _, product = self.norms
            losses = 1 - torch.where(usable, self.statistics[0] / product, 0.0)
        else:
            losses = self.statistics[0]
        return (losses * self.weight).sum() / self.count


def units_of(spec: AlignSpec, statistics: Tensor, weight: Tensor, entries: Tensor) -> Units:
    """Units from what each row contributes.

    Args:
        statistics: [n, B, G, R] of ``row_statistics``; R = 1 for pooled vectors.
        weight: [B, R] row weights. entries: [B, R] compared columns that each row sees.
    """
    rows, by_unit = _unit_weights(spec, weight, entries)
    count = _count(spec, by_unit, weight, entries, groups=statistics.shape[2])
    if spec.compare == "map":
        statistics = (statistics * rows).sum(-1, keepdim=True)
    return Units(statistics, by_unit, by_unit if spec.compare == "pooled" else rows, count)


def unit_count(spec: AlignSpec, weight: Tensor, entries: Tensor, groups: int) -> Tensor:
    """``Units.count`` alone, for who knows the rows but no statistics of them."""
    return _count(spec, _unit_weights(spec, weight, entries)[1], weight, entries, groups)


def _unit_weights(spec: AlignSpec, weight: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the rows [B, 1, R], 0 where a row sees nothing, and of the units [B, 1, U]."""
    seen = (entries > 0) & (weight > 0)
    rows = torch.where(seen, weight, 0.0).unsqueeze(1)
    if spec.compare == "row":
        return rows, rows
    return rows, seen.any(-1, keepdim=True).unsqueeze(1).to(weight.dtype)


def _count(
    spec: AlignSpec, by_unit: Tensor, weight: Tensor, entries: Tensor, groups: int
) -> Tensor:
    if spec.reduction == "sum":
        return weight.new_ones(())
    each = entries * weight if spec.reduction == "element_mean" else by_unit
    count = each.sum() * groups
    return torch.where(count == 0, 1.0, count)


def cosine(statistics: Tensor) -> Tensor:
    """cos from (st, ss, tt); 0 where either norm is 0."""
    usable, _, product = usable_norms(statistics)
    return torch.where(usable, statistics[0] / product, 0.0)


def usable_norms(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From (st, ss, tt): where both vectors have a direction, ss, and the product of their norms.

    The two are 1 where there is none. A squared norm below tiny / eps of the dtype counts as 0 (a norm
    of 3e-16 in float32): below that the squares of the entries are no longer normal numbers.
    """
    _, ss, tt = statistics
    info = torch.finfo(ss.dtype)
    usable = torch.minimum(ss, tt) > info.tiny / info.eps
    ss, tt = torch.where(usable, statistics[1:], 1.0)
    return usable, ss, ss.sqrt() * tt.sqrt()


# --------------------------------------------------------------------- rows and targets


def row_weights(problem: Problem) -> Tensor:
    """[B, R] in ``problem.dtype``: the weight of each compared row, 0 elsewhere."""
    used = problem.positions >= 0
    if problem.row_weight is None:
        return used.to(problem.dtype)
    return torch.where(used, problem.row_weight.to(problem.dtype), 0.0)


def expand_target(problem: Problem) -> Tensor:
    """The given map on the whole sequence: [B, G, R, L] (pooled: [B, G, L]), 0 outside."""
    target = problem.target
    assert target is not None
    if problem.target_index is not None:
        width = int(problem.columns.sum(-1).max()) if problem.columns.numel() else 0
        target = densify(target, problem.target_index, width)
    columns = problem.columns.cumsum(-1) - 1  # [B, L]
    on_columns = problem.columns
    if target.shape[-1] == 0:
        target = torch.nn.functional.pad(target, (0, 1))
    if problem.spec.compare == "pooled":
        index = columns.clamp(0, target.shape[-1] - 1).unsqueeze(1)
        full = target.gather(-1, index.expand(*target.shape[:2], -1))
        return full * on_columns.unsqueeze(1)
    used = problem.positions >= 0
    rows = (used.cumsum(-1) - 1).clamp(min=0, max=max(target.shape[2] - 1, 0))
    if target.shape[2] == 0:
        target = torch.nn.functional.pad(target, (0, 0, 0, 1))
    batch, groups = target.shape[:2]
    by_row = target.gather(2, rows[:, None, :, None].expand(batch, groups, -1, target.shape[-1]))
    index = columns.clamp(0, target.shape[-1] - 1)[:, None, None, :]
    full = by_row.gather(-1, index.expand(batch, groups, rows.shape[1], -1))
    return full * (used[:, None, :, None] & on_columns[:, None, None, :])


def densify(values: Tensor, index: Tensor, width: int) -> Tensor:
    """A sparse map [..., K] with column ordinals (-1: none) as a dense one [..., width]."""
    dense = values.new_zeros((*values.shape[:-1], width + 1))
    place = torch.where(index >= 0, index, width)
    return dense.scatter_add(-1, place, values * (index >= 0))[..., :width]
