"""Distillation: losses of a student against the labels and against its teacher."""

from .losses import lm_loss, logit_kd_loss

__all__ = ["lm_loss", "logit_kd_loss"]
