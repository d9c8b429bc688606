"""The losses on logits that accompany the alignment: next-token and logit distillation.

Both look at the positions whose *next* token carries a label. (A known slip is to mask the
distillation with the unshifted labels: the first answer token is then never distilled.)

These hold [tokens, vocabulary] several times over; ``fused.fused_linear_losses`` computes the same
from hidden states without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.cache import AnswerLogits
from .divergences import check_divergence, token_divergence

IGNORE_INDEX = -100
"""The label of a position that no loss looks at."""


def predicting(labels: Tensor) -> Tensor:
    """[B, L] labels -> [B, L] bool: the positions that predict a labelled token (never the last)."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def predicted(labels: Tensor) -> Tensor:
    """[B, L] labels -> [n]: the labelled tokens, in the order of ``predicting``'s positions."""
    targets = labels[:, 1:]
    return targets[targets != IGNORE_INDEX]


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, L, V] and [B, L] -> [n, V]: the logits that predict the n labelled tokens."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [B, L, V] "
            "and [B, L]"
        )
    return logits[predicting(labels)]


def lm_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of [n, V] logits and [n] targets: float32 (or float64) scalar."""
    return F.cross_entropy(wide(logits), targets, reduction="sum")


def kd_sum(
    student: Tensor, teacher: Tensor, *, divergence: str = "forward_kl", temperature: float = 1.0
) -> Tensor:
    """Sum over n tokens of the divergence of [n, V_s] from [n, V_t] logits, times temperature^2.

    Vocabularies of different length are cut to the shared prefix before the softmax. The gradient
    reaches the student only; the factor keeps its size independent of the temperature (Hinton et
    al., 2015).
    """
    check_divergence(divergence, temperature)
    shared = min(student.shape[-1], teacher.shape[-1])
    log_s = (wide(student[..., :shared]) / temperature).log_softmax(-1)
    log_t = (wide(teacher.detach()[..., :shared]) / temperature).log_softmax(-1)
    return token_divergence(log_s, log_t, divergence).sum() * temperature**2


def recorded_kd_sum(
    student: Tensor,
    teacher: AnswerLogits,
    *,
    vocabulary: int,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> Tensor:
    """``kd_sum`` from recorded distributions: over the k recorded tokens and one bucket of all others.

    The student's mass outside the k tokens is one entry, as the teacher's is. Merging entries can only
    make a divergence smaller: it is at most the whole vocabulary's, and equal to it where k is the
    vocabulary or where the student spreads the rest as the teacher does. What is lost is the teacher's
    word on unlikely tokens.

    Args:
        student: [n, V_s] logits. teacher: at the same n positions, recorded at this temperature.
        vocabulary: of what the teacher's distributions are; the student's logits are cut to it.
    """
    check_divergence(divergence, temperature)
    z = wide(student[..., :vocabulary]) / temperature
    log_all = z.logsumexp(-1, keepdim=True)
    log_s, log_t = z.gather(-1, teacher.tokens) - log_all, teacher.log_probs.to(z.dtype)
    if teacher.tokens.shape[-1] < vocabulary:
        others = z.scatter(-1, teacher.tokens, -torch.inf).logsumexp(-1, keepdim=True)
        # No mass at all is as good as e^-10000 of it, and 0 * -inf has no value.
        rest = teacher.rest.to(z.dtype).clamp(min=-1e4).unsqueeze(-1)
        log_s, log_t = torch.cat([log_s, others - log_all], -1), torch.cat([log_t, rest], -1)
    log_t = log_t.log_softmax(-1)  # stored in fewer digits, they do not quite add up to one
    return token_divergence(log_s, log_t, divergence).sum() * temperature**2


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens, float32 scalar; 0 where there is none."""
    targets = predicted(labels)
    return lm_sum(answer_logits(logits, labels), targets) / max(1, targets.numel())


def logit_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> Tensor:
    """Mean over the labelled tokens of ``kd_sum``'s divergence over the vocabulary.

    ``student_logits`` [B, L, V_s], ``teacher_logits`` [B, L, V_t], ``labels`` [B, L]; float32
    scalar, 0 where no token is labelled. The default is forward KL, KL(teacher || student).
    """
    student = answer_logits(student_logits, labels)
    teacher = answer_logits(teacher_logits, labels)
    total = kd_sum(student, teacher, divergence=divergence, temperature=temperature)
    return total / max(1, len(student))


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype.itemsize >= 4 else x.float()
