"""The two losses on logits that accompany the alignment: next-token and logit distillation.

Both look at the positions whose *next* token carries a label. (A known slip is to mask the
distillation with the unshifted labels: the first answer token is then never distilled.)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that no loss looks at."""


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, L, V] and [B, L] -> [n, V]: the logits that predict the n labelled tokens."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [B, L, V] "
            "and [B, L]"
        )
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens, float32 scalar; 0 where there is none."""
    targets = labels[:, 1:]
    targets = targets[targets != IGNORE_INDEX]
    total = F.cross_entropy(answer_logits(logits, labels).float(), targets, reduction="sum")
    return total / max(1, targets.numel())


def logit_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Mean over the labelled tokens of KL(teacher || student) over the vocabulary.

    ``student_logits`` [B, L, V_s], ``teacher_logits`` [B, L, V_t], ``labels`` [B, L]; float32
    scalar. Vocabularies of different length are cut to the shared prefix before the softmax. The
    gradient reaches the student only; it is scaled by temperature^2, so that its size does not
    depend on the temperature.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = answer_logits(student_logits, labels)[:, :shared].float() / temperature
    teacher = answer_logits(teacher_logits.detach(), labels)[:, :shared].float() / temperature
    total = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    return total * temperature**2 / max(1, len(student))
