"""Output projection, cross-entropy and logit distillation in one, a few tokens at a time.

With the last hidden states h [n, d] and the head W [V, d], the logits h W^T exist for one block of
tokens only: n x V is never held. At 4,096 tokens and a vocabulary of 151,936 one float32 copy of the
logits is 2.3 GiB, and plain autograd keeps several of them for each model.

The gradient is formed in the forward, while a block's logits are there:

    dz = w_lm (softmax(z) - onehot(target)) + w_kd T dD/d(z/T),    dh = dz W,    dW += dz^T h

(T^2 of the definition times 1/T of the chain rule leaves one T), and backward only multiplies it by
the upstream scalar. So the weights of the two terms must be known here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergences import check_divergence, logit_gradient, token_divergence

DEFAULT_BLOCK_BYTES = 64 * 2**20
"""Of one float32 block of logits; about six blocks are alive at once."""


class FusedLosses(NamedTuple):
    """Scalars. ``total`` = lm_weight * lm + kd_weight * kd carries the gradient; the others none."""

    total: Tensor
    lm: Tensor
    kd: Tensor


def fused_linear_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    lm_weight: float = 1.0,
    kd_weight: float = 1.0,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> FusedLosses:
    """``losses.lm_sum`` and ``losses.kd_sum`` of the logits ``hidden @ weight.T``.

    Args:
        hidden: [n, d_s], the student's last hidden states at the n positions.
        weight: [V_s, d_s], its head.
        targets: [n] int64, or None: no cross-entropy (lm is 0).
        teacher_hidden: [n, d_t], teacher_weight: [V_t, d_t]: both or neither (kd is 0). No gradient
            reaches them.
        lm_weight, kd_weight: of the two sums in ``total``.
        divergence, temperature: see ``losses.kd_sum``.
        block_bytes: of the logits that are held at a time; at least one token's.

    Logits are formed in ``hidden``'s type (the head is cast to it) and reduced in float32, or in
    float64 throughout for float64 inputs.

    Raises:
        ValueError: shapes that do not fit, an unknown divergence.
    """
    check_divergence(divergence, temperature)
    _check(hidden, weight, targets, teacher_hidden, teacher_weight)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach(), teacher_weight.detach())
    options = _Options(lm_weight, kd_weight, divergence, temperature, block_bytes)
    total, lm, kd = _Fused.apply(hidden, weight, targets, teacher, options)
    return FusedLosses(total, lm, kd)


class _Options(NamedTuple):
    lm_weight: float
    kd_weight: float
    divergence: str
    temperature: float
    block_bytes: int


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None,
        teacher: tuple[Tensor, Tensor] | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = _sweep(
                hidden, weight, targets, teacher, options, ctx.needs_input_grad[:2]
            )
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.present = [g is not None for g in gradients]
        total = options.lm_weight * sums[0] + options.kd_weight * sums[1]
        ctx.mark_non_differentiable(*sums)
        return total, sums[0], sums[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [next(saved) * upstream[0] if present else None for present in ctx.present]
        return (*gradients, None, None, None)


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    options: _Options,
    needs: tuple[bool, bool],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(lm, kd) and the gradients of total with respect to hidden and weight, where asked for."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.detach().to(hidden.dtype)
    if teacher is not None:
        teacher = (teacher[0], teacher[1].to(teacher[0].dtype))
    lm, kd = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    # Summed over the blocks in at least float32; a bfloat16 sum would lose the late blocks.
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    # A vocabulary shared by both sides in part needs its own student softmax over that part.
    shared = len(head) if teacher is None else min(len(head), len(teacher[1]))
    block = max(1, options.block_bytes // (max(1, len(head)) * wide.itemsize))
    for start in range(0, len(hidden), block):
        rows = slice(start, start + block)
        h = hidden.detach()[rows]
        logits = (h @ head.T).to(wide)
        dz = torch.zeros_like(logits) if any(needs) else None
        if targets is not None:
            log_s = logits.log_softmax(-1)
            chosen = targets[rows, None]
            lm -= log_s.gather(1, chosen).sum()
            if dz is not None:
                dz += log_s.exp_().scatter_add_(1, chosen, torch.full_like(log_s[:, :1], -1.0))
                dz *= options.lm_weight
            del log_s
        if teacher is not None:
            temperature = options.temperature
            log_s = (logits[:, :shared] / temperature).log_softmax(-1)
            log_t = (teacher[0][rows] @ teacher[1][:shared].T).to(wide)
            log_t = log_t.div_(temperature).log_softmax(-1)
            kd += token_divergence(log_s, log_t, options.divergence).sum() * temperature**2
            if dz is not None:
                step = logit_gradient(log_s, log_t, options.divergence)
                dz[:, :shared].add_(step, alpha=options.kd_weight * temperature)
        if dz is None:
            continue
        dz_narrow = dz.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = dz_narrow @ head
        if grad_weight is not None:
            grad_weight += dz_narrow.T @ h
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return (lm, kd), (grad_hidden, grad_weight)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [n, d] and [V, d]"
        )
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)}: expected [{len(hidden)}]")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight: expected both or neither")
    if teacher_hidden is None or teacher_weight is None:
        return
    if (
        teacher_hidden.dim() != 2
        or len(teacher_hidden) != len(hidden)
        or teacher_weight.dim() != 2
        or teacher_hidden.shape[1] != teacher_weight.shape[1]
    ):
        raise ValueError(
            f"teacher_hidden {tuple(teacher_hidden.shape)} and teacher_weight "
            f"{tuple(teacher_weight.shape)}: expected [{len(hidden)}, d_t] and [V_t, d_t]"
        )
