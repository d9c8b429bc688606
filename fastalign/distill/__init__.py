"""Distillation: losses of a student against the labels and against its teacher."""

from .features import hidden_sum, relation_loss
from .fused import FusedLosses, fused_linear_losses
from .losses import lm_loss, logit_kd_loss

__all__ = [
    "FusedLosses",
    "fused_linear_losses",
    "hidden_sum",
    "lm_loss",
    "logit_kd_loss",
    "relation_loss",
]
