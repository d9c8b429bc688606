"""Distil a small student from the shapes teacher: LM + logit distillation + attention alignment."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from examples.shapes.muon import Muon
from fastalign import AlignSpec
from fastalign.distill import lm_loss, logit_kd_loss
from fastalign.evals.shapes.dataset import draw_questions, pack, pixel_values, special_ids
from fastalign.evals.shapes.questions import TYPES
from fastalign.evals.shapes.world import make_scene
from fastalign.models import AttentionAlignment

SPEC = AlignSpec(compare="row", divergence="cosine")
"""1 - cos of every query row's attention to the visual tokens, heads averaged."""


@dataclass(frozen=True)
class StudentSettings:
    """``align_weight`` 0 trains without the alignment term: the control."""

    seed: int = 0
    steps: int = 700
    batch_size: int = 32
    questions: int = 10
    length: int = 140
    lr: float = 4e-3
    kd_weight: float = 1.0
    align_weight: float = 10.0


@dataclass
class History:
    """One entry per step."""

    lm: list[float] = field(default_factory=list)
    kd: list[float] = field(default_factory=list)
    alignment: list[float] = field(default_factory=list)


def make_alignment(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration
) -> AttentionAlignment:
    """Layers one to one, every row to the visual columns."""
    return AttentionAlignment(student, teacher, spec=SPEC, layers="all", rows="all")


def draw_inputs(settings: StudentSettings, step: int) -> dict[str, Tensor]:
    """The batch of a step: new training scenes, a function of the seed and the step alone."""
    rng = random.Random(f"student/{settings.seed}/{step}")
    first = step * settings.batch_size
    scenes = [
        make_scene("train", first + i, seed=settings.seed) for i in range(settings.batch_size)
    ]
    weights = dict.fromkeys(TYPES, 1.0)
    batch = pack(
        [draw_questions(scene, rng, settings.questions, weights) for scene in scenes],
        settings.length,
    )
    return {
        **batch,
        "attention_mask": (batch["input_ids"] != special_ids()[2]).long(),
        "pixel_values": pixel_values(scenes),
    }


def train_student(
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    settings: StudentSettings,
    *,
    progress: Callable[[int, History], None] | None = None,
) -> History:
    """Train the student in place; ``progress(step, history)`` is called after every step."""
    teacher.eval().requires_grad_(False)
    student.train()
    alignment = make_alignment(student, teacher) if settings.align_weight else None
    trained = [p for p in student.parameters() if p.requires_grad]
    makers = optimizers(student, settings.lr)
    rates = [maker.param_groups[0]["lr"] for maker in makers]
    history = History()
    for step in range(settings.steps):
        for maker, full in zip(makers, rates, strict=True):
            maker.param_groups[0]["lr"] = full * rate(step, settings.steps)
        lm, kd, align = _losses(student, teacher, alignment, draw_inputs(settings, step))
        loss = lm + settings.kd_weight * kd + settings.align_weight * align
        for maker in makers:
            maker.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for maker in makers:
            maker.step()
        for values, value in zip(
            (history.lm, history.kd, history.alignment), (lm, kd, align), strict=True
        ):
            values.append(value.item())
        if progress:
            progress(step + 1, history)
    return history


@torch.no_grad()
def similarity(
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    inputs: dict[str, Tensor],
) -> dict[str, float]:
    """Mean cosine of the two models' visual attention: "layer 0", ..., "mean"."""
    alignment = make_alignment(student, teacher)
    _losses(student, teacher, alignment, inputs)
    metrics = alignment.metrics()
    layers = {
        name.removesuffix("/similarity").replace("_", " "): value
        for name, value in metrics.items()
        if name.endswith("/similarity")
    }
    return {**layers, "mean": sum(layers.values()) / len(layers)}


def _losses(
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    alignment: AttentionAlignment | None,
    inputs: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """LM, distillation and alignment loss of a batch; no alignment counts as 0."""
    labels = inputs["labels"]
    seen = {name: value for name, value in inputs.items() if name != "labels"}
    if alignment is None:
        with torch.no_grad():
            teacher_logits = teacher(**seen, use_cache=False).logits
        student_logits = student(**seen, use_cache=False).logits
        align = torch.zeros(())
    else:
        with alignment.step(inputs):
            with torch.no_grad():
                teacher_logits = teacher(**seen, use_cache=False).logits
            student_logits = student(**seen, use_cache=False).logits
        align = alignment.loss()
    return (
        lm_loss(student_logits, labels),
        logit_kd_loss(student_logits, teacher_logits, labels),
        align,
    )


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices; Adam at half the rate for the rest."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in trained if p.ndim == 2 and "layers." in name]
    ids = {id(p) for p in inside}
    others = [p for _, p in trained if id(p) not in ids]
    return [Muon(inside, lr=lr), torch.optim.Adam(others, lr=lr / 2, betas=(0.9, 0.95))]


def rate(step: int, steps: int) -> float:
    """A short warm-up, then a linear decay over the last half."""
    warm = max(1, min(30, steps // 10))
    return min(1.0, (step + 1) / warm, max(0.02, 2 * (steps - step) / steps))
