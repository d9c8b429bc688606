r"""The gradient of the definition, entry by entry: what backends that stream share.

A backend that never holds a whole map works in two steps. The forward keeps ``maths.row_statistics``,
a few numbers a row. ``row_coefficients`` turns them into what each row's entries are multiplied with,
and ``entry_gradient`` gives, for any tile of the maps, either

    g[i, j] = dL / dA_s[i, j]            (maps as they are), or
    E[i, j] = dL / d log A_s[i, j]       (``spec.in_logs``: finite where A_s underflows)

From there the softmax's backward is, for head h of weight w in group g,

    X = P_h w g   or   X = E exp(log P_h + log w - log A);   dS_h = X - P_h sum_V X

(keys outside V get the second term alone), as derived in DESIGN.md. There is no autograd in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .maths import Units
from .spec import AlignSpec


def row_coefficients(spec: AlignSpec, units: Units, grad: Tensor) -> Tensor:
    """d loss / d statistics, times the upstream gradient: [n, B, G, R].

    cosine, with c = st / sqrt(ss tt) of the unit: d(1 - c)/d st = -1 / sqrt(ss tt), d(1 - c)/d ss =
    c / (2 ss); the teacher's own norm carries no gradient. Other divergences: 1. Each times the row's
    weight and the upstream gradient, over the count.

    Args:
        units: of ``maths.units_of``. grad: scalar.
    """
    weight = units.rows * (grad.to(units.rows.dtype) / units.count)
    if spec.divergence != "cosine":
        groups = units.statistics.shape[2]
        return weight.expand(-1, groups, -1).unsqueeze(0)
    usable, ss, product = units.norms
    by_st = torch.where(usable, -1 / product, 0.0)
    by_ss = by_st * units.statistics[0] / (-2 * ss)  # c = -st by_st
    by_st, by_ss = by_st * weight, by_ss * weight
    return torch.stack([by_st, by_ss, torch.zeros_like(by_st)])


def entry_gradient(
    spec: AlignSpec,
    a_s: Tensor,
    a_t: Tensor,
    log_s: Tensor,
    log_t: Tensor,
    keep: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """dL/dA_s, or dL/d log A_s if ``spec.in_logs``, of one tile; 0 outside ``keep``.

    In logs, with u = dL/dA_s: E = A_s u. kl: -t. reverse_kl: s (log s - log t + 1).
    js: s (log s - log m) / 2, m = (s + t) / 2. cosine and mse: A_s times their linear form.

    Args:
        a_s, a_t, log_s, log_t, keep: [..., I, C]. coefficients: [n, ..., I] of ``row_coefficients``.
    """
    c = coefficients.unsqueeze(-1)
    if spec.divergence == "kl":
        gradient = -c[0] * a_t
    elif spec.divergence == "reverse_kl":
        gradient = c[0] * a_s * (log_s - log_t + 1)
    elif spec.divergence == "js":
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        gradient = c[0] * 0.5 * a_s * (log_s - log_m)
    else:
        if spec.divergence == "cosine":
            gradient = c[0] * a_t + 2 * c[1] * a_s
        else:
            gradient = 2 * c[0] * (a_s - a_t)
        if spec.in_logs:
            gradient = gradient * a_s
    return torch.where(keep, gradient, 0.0)


def through_pooling(
    gradient: Tensor,
    keep: Tensor,
    weight: Tensor,
    count: Tensor,
    log_a: Tensor | None,
    log_pooled: Tensor,
) -> Tensor:
    """From the pooled vector back to the entries of a tile of rows.

    pooled_j = sum_i w_i A_ij / n_j over the kept rows, so dL/dA_ij = u_j w_i / n_j; in logs
    E_ij = E_j w_i A_ij / (n_j pooled_j) = E_j exp(log A_ij + log w_i - log n_j - log pooled_j).

    Args:
        gradient: [G, C], by the pooled vector. keep: [G, I, C]. weight: [I]. count: [G, C] = n_j.
        log_a: [G, I, C], or None for maps that are not kept in logs. log_pooled: [G, C].
    """
    kept = keep & (weight > 0)[:, None]
    count = torch.where(count > 0, count, 1.0).unsqueeze(-2)
    share = weight[:, None] / count
    if log_a is not None:
        share = share * torch.where(kept, log_a - log_pooled.unsqueeze(-2), -math.inf).exp()
    return torch.where(kept, gradient.unsqueeze(-2) * share, 0.0)


def through_renormalisation(gradient: Tensor, a_s: Tensor) -> Tensor:
    """``normalize="visual"``, in logs: dL/d log A = E - Ā sum_V E with Ā = A / sum_V A."""
    return gradient - a_s * gradient.sum(-1, keepdim=True)


def sink_gradient(sink: Tensor | None, lse: Tensor, delta: Tensor, temperature: float) -> Tensor:
    """d loss / d sink logits [H]; empty without sinks.

    A sink is one more score in a row's softmax, whose probability no map holds: dS = X - P sum_V X with
    X = 0, so d sink_h = - sum_i exp(sink_h / temperature - LSE_h[i]) delta_h[i] / temperature.

    Args:
        sink: [H] or None. lse: [B, H, R], the sink included. delta: [B, H, R], sum_V X of each row (0
            where it sees nothing).
    """
    if sink is None:
        return delta.new_zeros((0,))
    log_p = sink.to(lse.dtype).view(1, -1, 1) / temperature - lse
    # at most 0 but for rounding, and for rows without a key, whose log-sum-exp is not one
    return -(log_p.clamp(max=0.0).exp() * delta).sum((0, 2)) / temperature
