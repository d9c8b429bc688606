"""Output projection, cross-entropy and logit distillation in one, a tile of tokens x vocabulary at a time.

With the last hidden states h [n, d] and the head W [V, d], the logits h W^T exist for one block of
tokens and one piece of the vocabulary only: n x V is never held, of neither model. At 4,096 tokens and a
vocabulary of 151,936 one float32 copy of the logits is 2.3 GiB, and plain autograd keeps several of them
for each model.

The gradient is formed in the forward, while a tile's logits are there:

    dz = w_lm (softmax(z) - onehot(target)) + w_kd T dD/d(z/T),    dh = dz W,    dW += dz^T h

(T^2 of the definition times 1/T of the chain rule leaves one T), and backward only multiplies it by
the upstream scalar. So the weights of the two terms must be known here.

The softmax of a block needs its whole vocabulary: a first sweep over the pieces accumulates log-sum-exps,
a second one forms losses and gradients from them. reverse_kl and js need one more between them, for a sum
that their gradient subtracts. A block whose vocabulary is in one piece computes its logits once and keeps
them for all sweeps; in several pieces it computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.cache import AnswerLogits
from .divergences import check_divergence, gradient_centre, logit_gradient, token_divergence
from .losses import lm_sum, recorded_kd_sum

DEFAULT_BLOCK_BYTES = 64 * 2**20
"""Of one float32 tile of logits; about seven such tiles are alive at once."""
MIN_ROWS = 64
"""The vocabulary is cut where a tile of that many tokens would be larger: fewer make slow products."""


class Recorded(NamedTuple):
    """A teacher's recorded distributions in its logits' place, and the vocabulary that they are over."""

    answers: AnswerLogits
    vocabulary: int


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
    recorded: Recorded | None = None,
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
        block_bytes: of a tile of logits; at least one of one token.
        recorded: in a teacher's place, at the n positions; kd is then ``losses.recorded_kd_sum``, and a
            tile holds the whole vocabulary.

    Logits are formed in ``hidden``'s type (the head is cast to it) and reduced in float32, or in
    float64 throughout for float64 inputs.

    Raises:
        ValueError: shapes that do not fit, an unknown divergence.
    """
    check_divergence(divergence, temperature)
    _check(hidden, weight, targets, teacher_hidden, teacher_weight)
    teacher: _Teacher = recorded
    if recorded is not None and (
        teacher_hidden is not None or len(recorded.answers.tokens) != len(hidden)
    ):
        raise ValueError(
            f"recorded has {len(recorded.answers.tokens)} positions; allowed: {len(hidden)}, and no "
            "teacher beside it"
        )
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach(), teacher_weight.detach())
    options = _Options(lm_weight, kd_weight, divergence, temperature, block_bytes)
    total, lm, kd = _Fused.apply(hidden, weight, targets, teacher, options)
    return FusedLosses(total, lm, kd)


#: (hidden states, head), or what was recorded of it, or nothing.
_Teacher = tuple[Tensor, Tensor] | Recorded | None


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
        teacher: _Teacher,
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
    teacher: _Teacher,
    options: _Options,
    needs: tuple[bool, bool],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(lm, kd) and the gradients of total with respect to hidden and weight, where asked for."""
    hidden = hidden.detach()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.detach().to(hidden.dtype)
    if isinstance(teacher, tuple) and not isinstance(teacher, Recorded):
        teacher = (teacher[0], teacher[1].to(teacher[0].dtype))
    lm, kd = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    # Summed over the blocks in at least float32; a bfloat16 sum would lose the late blocks.
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    rows, columns = tile_shape(len(hidden), len(head), options.block_bytes // wide.itemsize)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        chosen = None if targets is None else targets[part]
        block: _Block | _RecordedBlock
        if isinstance(teacher, Recorded):
            answers = AnswerLogits(*(x[part] for x in teacher.answers))
            recorded = Recorded(answers, teacher.vocabulary)
            block = _RecordedBlock(hidden[part], head, chosen, recorded, wide, options)
        else:
            theirs = None if teacher is None else (teacher[0][part], teacher[1])
            block = _Block(hidden[part], head, chosen, theirs, columns, wide, options)
        of_hidden = torch.zeros_like(block.h, dtype=wide) if needs[0] else None
        for place, tile in block.losses(gradient=any(needs)):
            lm += tile.lm
            kd += tile.kd
            if tile.dz is None:
                continue
            dz = tile.dz.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden += dz @ head[place]
            if grad_weight is not None:
                grad_weight[place] += dz.T @ block.h
        if grad_hidden is not None and of_hidden is not None:
            grad_hidden[part] = of_hidden.to(hidden.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return (lm, kd), (grad_hidden, grad_weight)


def tile_shape(tokens: int, vocabulary: int, entries: int) -> tuple[int, int]:
    """(tokens, vocabulary) of a tile of at most ``entries`` logits, and of at least one.

    The whole vocabulary where MIN_ROWS tokens of it fit, since every cut costs the products again.
    """
    rows = max(1, min(tokens, max(MIN_ROWS, entries // max(1, vocabulary))))
    rows = min(rows, max(1, entries))
    return rows, max(1, min(vocabulary, entries // rows))


class _Tile(NamedTuple):
    """Sums over a tile, and the gradient with respect to its logits [r, v]."""

    lm: Tensor
    kd: Tensor
    dz: Tensor | None


class _LogSum:
    """The log-sum-exp of rows that come in pieces, as largest + rest: z - largest loses no digits."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.largest = torch.full((rows,), -math.inf, device=device, dtype=dtype)
        self.rest = torch.zeros_like(self.largest)

    def add(self, z: Tensor) -> None:
        largest = torch.maximum(self.largest, z.amax(-1))
        here = (z - largest.unsqueeze(1)).exp_().sum(-1)
        self.rest = (self.rest.exp() * (self.largest - largest).exp() + here).log()
        self.largest = largest

    def normalise(self, z: Tensor) -> Tensor:
        """log softmax of a piece: [r, v]."""
        return (z - self.largest.unsqueeze(1)).sub_(self.rest.unsqueeze(1))


class _Block:
    """A block of tokens: h [r, d] with its targets [r] and the teacher's ([r, d_t], [V_t, d_t])."""

    def __init__(
        self,
        h: Tensor,
        head: Tensor,
        targets: Tensor | None,
        teacher: tuple[Tensor, Tensor] | None,
        columns: int,
        wide: torch.dtype,
        options: _Options,
    ) -> None:
        self.h, self.head, self.targets, self.teacher = h, head, targets, teacher
        self.wide, self.options = wide, options
        self.places = [slice(c, min(c + columns, len(head))) for c in range(0, len(head), columns)]
        # A vocabulary shared by both sides in part needs its own student softmax over that part.
        self.shared = 0 if teacher is None else min(len(head), len(teacher[1]))
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def logits(self, place: slice) -> tuple[Tensor, Tensor | None]:
        """(student's [r, v], teacher's [r, v'] / T over the shared part of the piece or None)."""
        if self._kept is not None:
            return self._kept
        z = (self.h @ self.head[place].T).to(self.wide)
        both = slice(place.start, min(place.stop, self.shared))
        z_t = None
        if self.teacher is not None and both.start < both.stop:
            z_t = (self.teacher[0] @ self.teacher[1][both].T).to(self.wide)
            z_t = z_t.div_(self.options.temperature)
        if len(self.places) == 1:
            self._kept = (z, z_t)
        return z, z_t

    def losses(self, *, gradient: bool) -> Iterator[tuple[slice, _Tile]]:
        """Every piece of the vocabulary with its share of the sums."""
        lm_sum, *kd_sums = self._log_sums()
        divergence, temperature = self.options.divergence, self.options.temperature
        centre = torch.zeros_like(lm_sum.rest)
        if gradient and self.shared and divergence != "forward_kl":
            for place in self.places:
                z, z_t = self.logits(place)
                if z_t is not None:
                    log_s, log_t = self._log_probabilities(z, z_t, kd_sums)
                    centre += gradient_centre(log_s, log_t, divergence)
                    del log_s, log_t
        for place in self.places:
            z, z_t = self.logits(place)
            lm = kd = centre.new_zeros(())
            dz: Tensor | None = None
            if self.targets is not None:
                at, inside = self._targets_in(place)
                log_p = lm_sum.normalise(z)
                lm = -torch.where(inside, log_p.gather(1, at).squeeze(1), 0.0).sum()
                if gradient:
                    dz = log_p.exp_()
                    dz.scatter_add_(1, at, -inside.to(dz.dtype).unsqueeze(1))
                    dz *= self.options.lm_weight
            if z_t is not None:
                log_s, log_t = self._log_probabilities(z, z_t, kd_sums)
                kd = token_divergence(log_s, log_t, divergence).sum() * temperature**2
                if gradient:
                    step = logit_gradient(log_s, log_t, divergence, centre)
                    dz = torch.zeros_like(z) if dz is None else dz
                    dz[:, : step.shape[1]].add_(step, alpha=self.options.kd_weight * temperature)
                    del step
                del log_s, log_t
            yield place, _Tile(lm, kd, dz)

    def _log_sums(self) -> list[_LogSum]:
        """The student's for the LM, the student's and the teacher's for the KD (over T, shared part)."""
        sums = [_LogSum(len(self.h), self.h.device, self.wide) for _ in range(3)]
        for place in self.places:
            z, z_t = self.logits(place)
            if self.targets is not None:
                sums[0].add(z)
            if z_t is not None:
                sums[1].add(z[:, : z_t.shape[1]] / self.options.temperature)
                sums[2].add(z_t)
        return sums

    def _log_probabilities(
        self, z: Tensor, z_t: Tensor, sums: list[_LogSum]
    ) -> tuple[Tensor, Tensor]:
        ours = z[:, : z_t.shape[1]] / self.options.temperature
        return sums[0].normalise(ours), sums[1].normalise(z_t)

    def _targets_in(self, place: slice) -> tuple[Tensor, Tensor]:
        """([r, 1] the targets' places in the piece, 0 where elsewhere; [r] bool: inside)."""
        assert self.targets is not None
        inside = (self.targets >= place.start) & (self.targets < place.stop)
        return torch.where(inside, self.targets - place.start, 0).unsqueeze(1), inside


class _RecordedBlock:
    """A block of tokens beside what was recorded of the teacher: one tile, differentiated by torch."""

    def __init__(
        self,
        h: Tensor,
        head: Tensor,
        targets: Tensor | None,
        recorded: Recorded,
        wide: torch.dtype,
        options: _Options,
    ) -> None:
        self.h, self.head, self.targets, self.recorded = h, head, targets, recorded
        self.wide, self.options = wide, options

    def losses(self, *, gradient: bool) -> Iterator[tuple[slice, _Tile]]:
        """The whole vocabulary with its sums."""
        z = (self.h @ self.head.T).to(self.wide).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            kd = recorded_kd_sum(
                z,
                self.recorded.answers,
                vocabulary=self.recorded.vocabulary,
                divergence=self.options.divergence,
                temperature=self.options.temperature,
            )
            lm = kd.new_zeros(()) if self.targets is None else lm_sum(z, self.targets)
            total = self.options.lm_weight * lm + self.options.kd_weight * kd
        dz = torch.autograd.grad(total, z)[0] if gradient else None
        yield slice(0, len(self.head)), _Tile(lm.detach(), kd.detach(), dz)


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
