"""Losses on hidden states: direct distance, and the relation of the visual tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import wide

HIDDEN_DISTANCES = ("mse", "cosine")


def hidden_sum(student: Tensor, teacher: Tensor, distance: str = "mse") -> Tensor:
    """Sum over n tokens of the distance of [n, d] hidden states; float32 or float64 scalar.

    ``mse``: the mean over the d features of the squared difference. ``cosine``: 1 - cos. Models of
    different width need a learned projection first. The gradient reaches the student only.
    """
    if distance not in HIDDEN_DISTANCES:
        raise ValueError(f"distance is {distance!r}; allowed: {', '.join(HIDDEN_DISTANCES)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: expected the same "
            "[n, d] (project the student's states to the teacher's width first)"
        )
    student, teacher = wide(student), wide(teacher.detach())
    if distance == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()
    total: Tensor = (student - teacher).square().mean(-1).sum()
    return total


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(S S^T, T T^T) of one sample's [N, d_s] and [N, d_t] visual hidden states: a scalar.

    LLaVA-KD's relation distillation (arXiv 2410.16236) compares the N x N self-correlations. Their
    inner products need no N x N matrix: <S S^T, T T^T> = |S^T T|^2 and |S S^T| = |S^T S|, Frobenius
    norms of d x d matrices. A sample whose states are all zero has cosine 0.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: expected the same "
            "number of visual tokens"
        )
    s, t = _unit(wide(student)), _unit(wide(teacher.detach()))
    cross, own, target = (s.T @ t).square().sum(), (s.T @ s).norm(), (t.T @ t).norm()
    loss: Tensor = 1 - cross / (own * target).clamp_min(torch.finfo(s.dtype).tiny)
    return loss


def _unit(x: Tensor) -> Tensor:
    """Scaled so that fourth powers neither overflow nor underflow; the cosine does not change."""
    scaled: Tensor = x / x.detach().norm().clamp_min(torch.finfo(x.dtype).tiny)
    return scaled
