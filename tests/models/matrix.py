"""Measures one configuration against eager attention, and prints the support matrix.

``python -m tests.models.matrix`` writes docs/support-matrix.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.models import AttentionAlignment, visual_attention
from fastalign.models.view import ModelView
from tests.models import eager, tiny
from tests.models.zoo import CASES, Batch, Case

TABLE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


@dataclass(frozen=True)
class Result:
    """Largest absolute error of a map, relative errors of the loss and of all gradients.

    ``size`` is the loss itself, so that a comparison of zeros shows. ``near``: of each layer's loss by the
    outputs of its own q_proj and k_proj, all layers as one vector (bfloat16, without checkpointing).
    """

    map: float
    loss: float
    gradient: float
    size: float
    near: float = 0.0


def map_error(model: Any, weights: dict[int, Tensor], inputs: Batch) -> float:
    """Largest absolute difference of captured head-mean maps from eager weights."""
    ours = visual_attention(model, inputs)
    columns, worst = eager.visual_mask(model, inputs), 0.0
    assert set(ours) == set(weights)
    for layer, map in ours.items():
        for b, valid in enumerate(inputs["attention_mask"].bool()):
            wanted = weights[layer].float().mean(1)[b][valid][:, columns[b]]
            assert wanted.max() > 0.01
            worst = max(worst, float((map[b, valid, : wanted.shape[1]] - wanted).abs().max()))
    return worst


def measure(case: Case, *, left: bool, checkpointing: bool) -> Result:
    """Map, loss and gradients of one configuration in float32, every layer with its own."""
    student, teacher = case.model(seed=2).train(), case.model(seed=1)
    inputs = case.batch(student, left=left)
    reference, teacher_ref = eager.eager_copy(student), eager.eager_copy(teacher)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, inputs)
    error = map_error(teacher, weights_t, inputs)
    if checkpointing:
        tiny.checkpoint_layers(student)

    loss = our_loss(student, teacher, inputs)
    loss.backward()
    loss_ref = eager_loss(reference, weights_t, inputs)
    loss_ref.backward()
    ours, theirs = eager.gradients(student), eager.gradients(reference)
    return Result(
        map=error,
        loss=float((loss - loss_ref).detach().abs() / loss_ref.detach().abs()),
        gradient=eager.relative_error(ours, theirs),
        size=loss_ref.item(),
    )


def our_loss(student: Any, teacher: Any, inputs: Batch) -> Tensor:
    """The alignment of every layer; a little of the LM loss gives every parameter a gradient."""
    return our_losses(student, teacher, inputs)[0]


def our_losses(student: Any, teacher: Any, inputs: Batch) -> tuple[Tensor, dict[int, Tensor]]:
    """``our_loss``, and the alignment's loss of each layer."""
    alignment = AttentionAlignment(student, teacher, layers="all")
    with alignment.step(inputs) as step:
        with torch.no_grad():
            teacher(**inputs)
        out = student(**inputs)
    return alignment.loss() + 0.01 * out.loss, step.losses


def eager_loss(student: Any, weights_t: dict[int, Tensor], inputs: Batch) -> Tensor:
    """The same from whole maps."""
    out, weights_s = eager.attentions(student, inputs)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    matching = {layer: (layer,) for layer in weights_s}
    return eager.cosine_loss(weights_s, weights_t, matching, rows, columns) + 0.01 * out.loss


Projections = dict[int, list[Tensor]]


@contextmanager
def projections(model: Any) -> Iterator[Projections]:
    """Layer -> what its q_proj and k_proj return inside."""
    found: Projections = {}
    handles = []
    for layer, attention in ModelView("student", model).attentions.items():
        found[layer] = []
        for name in ("q_proj", "k_proj"):
            if hasattr(attention, name):  # layers that reuse keys have none
                keep = partial(_keep, found[layer])
                handles.append(getattr(attention, name).register_forward_hook(keep))
    yield found
    for handle in handles:
        handle.remove()


def _keep(found: list[Tensor], module: Any, arguments: Any, output: Tensor) -> None:
    found.append(output)


def near_gradients(losses: Mapping[int, Tensor], found: Projections) -> dict[str, Tensor]:
    """Gradients of each layer's loss by its own projections."""
    return {
        f"{layer} {i}": gradient
        for layer, outputs in found.items()
        for i, gradient in enumerate(torch.autograd.grad(losses[layer], outputs, retain_graph=True))
    }


def measure_bf16(case: Case, *, left: bool, checkpointing: bool = False) -> Result:
    """The same in bfloat16, against float64 softmaxes of the very q and k that attention received.

    (Eager attention itself rounds q k^T to bfloat16, and the models' other rounding would drown all.)
    """
    student, teacher, inputs = in_bf16(case, left)
    reference = copy.deepcopy(student)
    with torch.no_grad():
        _, weights_t = eager.recorded(teacher, inputs)
    error = map_error(teacher, weights_t, inputs)
    if checkpointing:
        tiny.checkpoint_layers(student)
    with projections(student) as found:
        loss, losses = our_losses(student, teacher, inputs)
    near = None if checkpointing else near_gradients(losses, found)
    loss.backward()
    with projections(reference) as found:
        loss_ref, losses = recorded_losses(reference, weights_t, inputs, torch.float64)
    near_ref = near_gradients(losses, found)
    loss_ref.backward()
    return Result(
        map=error,
        loss=float((loss - loss_ref).detach().abs() / loss_ref.detach().abs()),
        gradient=eager.relative_error(eager.gradients(student), eager.gradients(reference)),
        size=loss_ref.item(),
        near=0.0 if near is None else eager.relative_error(near, near_ref),
    )


def in_bf16(case: Case, left: bool) -> tuple[Any, Any, Batch]:
    """(student, teacher, batch)."""
    student, teacher = case.model(seed=2).train().bfloat16(), case.model(seed=1).bfloat16()
    inputs = case.batch(case.model(), left=left)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    return student, teacher, inputs


def recorded_losses(
    student: Any, weights_t: dict[int, Tensor], inputs: Batch, dtype: torch.dtype
) -> tuple[Tensor, dict[int, Tensor]]:
    """``our_losses`` from the q and k that the student's attention receives, softmaxes in ``dtype``."""
    out, weights_s = eager.recorded(student, inputs, dtype)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    losses = {
        layer: eager.cosine_loss(weights_s, weights_t, {layer: (layer,)}, rows, columns)
        for layer in weights_s
    }
    return torch.stack(list(losses.values())).mean() + 0.01 * out.loss, losses


def bf16_noise(case: Case, *, left: bool) -> float:
    """How far the reference's own gradient moves where its softmaxes are in float32, not float64."""
    student, teacher, inputs = in_bf16(case, left)
    with torch.no_grad():
        _, weights_t = eager.recorded(teacher, inputs)
    found = []
    for dtype in (torch.float32, torch.float64):
        student.zero_grad()
        recorded_losses(student, weights_t, inputs, dtype)[0].backward()
        found.append(eager.gradients(student))
    return eager.relative_error(*found)


HEADER = """# Support matrix

Measured by `python -m tests.models.matrix` on tiny random-weight models (nothing is downloaded), batch
2, one image in the first sample and two in the second, float32 on a CPU; `tests/models/test_families.py`
asserts the limits. *map*: largest absolute difference between the captured head-mean map and the
model's own eager weights (limit 1e-5). *loss* and *gradient*: relative difference from the same
objective through eager attention with `output_attentions`, the gradient over all parameters of the
student as one vector (limit 1e-4), without and with gradient checkpointing. Each figure is the worst of
left and right padding. *base*: the attention that runs beneath; `eager` where transformers has no other.
*bf16*: the same models in bfloat16, against softmaxes in float64 of the very q and k that their attention
received, with the mask as it arrived (eager attention itself rounds q k^T). *near*: the gradient of each
layer's loss by what its own q_proj and k_proj return (limits: map 1e-5, loss 1e-3, near 1e-2; the unit of
bfloat16 is 8e-3). *all*: by all parameters (limit 3e-2). Each layer that a gradient passes in bfloat16
rounds it anew, and one other rounding in front becomes many: with softmaxes in float32 instead of float64
the reference itself moves by up to {noise:.1e}.

| family | base | what is peculiar | map | loss | gradient | checkpointed | bf16 map | loss | near | all |
|---|---|---|---|---|---|---|---|---|---|---|
"""

FOOTER = """
Attention sinks (GPT-OSS) take part in the softmax and get their gradient. Qwen3.5's linear-attention
layers have no map.
Gemma 3 and 4 hide keys before the sliding window even inside an image: rows inside an image longer than the
window are refused, others are not. Flash attention, FlexAttention,
compiled layers and other patch grids: [capture.md](capture.md).
"""


def row(case: Case) -> str:
    """One line of the table."""
    plain = [measure(case, left=left, checkpointing=False) for left in (False, True)]
    saved = [measure(case, left=left, checkpointing=True) for left in (False, True)]
    half = [measure_bf16(case, left=left) for left in (False, True)]
    cells = [
        case.name,
        case.base,
        case.note,
        f"{max(r.map for r in plain):.1e}",
        f"{max(r.loss for r in plain):.1e}",
        f"{max(r.gradient for r in plain):.1e}",
        f"{max(r.gradient for r in saved):.1e}",
        *(f"{max(getattr(r, x) for r in half):.1e}" for x in ("map", "loss", "near", "gradient")),
    ]
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    lines, noise = [], 0.0
    for case in CASES:
        lines.append(row(case))
        noise = max(noise, *(bf16_noise(case, left=left) for left in (False, True)))
        print(lines[-1], end="", flush=True)
    TABLE.write_text(HEADER.format(noise=noise) + "".join(lines) + FOOTER)
