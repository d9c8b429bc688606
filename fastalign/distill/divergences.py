"""Divergences of two next-token distributions and their gradients: the definition of logit KD.

Both functions take log-probabilities and work row by row, so that the plain losses and the fused
ones (``fused``) are the same objective, evaluated on all rows or on a few at a time.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "js"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)


def check_divergence(divergence: str, temperature: float) -> None:
    """Raises: ValueError: an unknown divergence, or a temperature that is not a finite number > 0."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; allowed: {', '.join(DIVERGENCES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}; allowed: a finite number > 0")


def token_divergence(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """[n, V] log-probabilities -> [n], in nats; a sum over the vocabulary, so pieces of it add up.

    ``forward_kl``: KL(teacher || student). ``reverse_kl``: KL(student || teacher). ``js``: half of
    each one's KL to the mean of both.
    """
    if divergence == "forward_kl":
        return _kl(teacher, student)
    if divergence == "reverse_kl":
        return _kl(student, teacher)
    middle = _log_mean(student, teacher)
    return (_kl(teacher, middle) + _kl(student, middle)) / 2


def gradient_centre(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """[n]: what ``logit_gradient`` needs of the whole vocabulary; a sum over it, so pieces add up."""
    if divergence == "forward_kl":
        return student.new_zeros(len(student))
    return (student.exp() * _slope(student, teacher, divergence)).sum(-1)


def logit_gradient(student: Tensor, teacher: Tensor, divergence: str, centre: Tensor) -> Tensor:
    """d token_divergence / d (logits whose log-softmax ``student`` is) -> [n, V].

    With p = softmax(z) and dD/dp = g: dD/dz = p (g - sum p g); ``centre`` is that sum, over the whole
    vocabulary, whatever piece of it is given. forward_kl: p - p_t.
    """
    p = student.exp()
    if divergence == "forward_kl":
        return p - teacher.exp()
    return p * (_slope(student, teacher, divergence) - centre.unsqueeze(-1))


def _slope(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """dD/dp of reverse_kl and js, without constants: these fall out, because p sums to one."""
    if divergence == "reverse_kl":
        return student - teacher
    return (student - _log_mean(student, teacher)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _log_mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(a, b) - math.log(2)
