"""Measures one configuration against eager attention, and prints the support matrix.

``python -m tests.models.matrix`` writes docs/support-matrix.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.models import AttentionAlignment, visual_attention
from tests.models import eager, tiny
from tests.models.zoo import CASES, Batch, Case

TABLE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


@dataclass(frozen=True)
class Result:
    """Largest absolute error of a map, relative errors of the loss and of all gradients.

    ``size`` is the loss itself, so that a comparison of zeros shows.
    """

    map: float
    loss: float
    gradient: float
    size: float


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
    for name in [name for name in theirs if name.endswith(".sinks")]:
        del ours[name], theirs[name]  # the core gives the sinks no gradient
    return Result(
        map=error,
        loss=float((loss - loss_ref).detach().abs() / loss_ref.detach().abs()),
        gradient=eager.relative_error(ours, theirs),
        size=loss_ref.item(),
    )


def our_loss(student: Any, teacher: Any, inputs: Batch) -> Tensor:
    """The alignment of every layer; a little of the LM loss gives every parameter a gradient."""
    alignment = AttentionAlignment(student, teacher, layers="all")
    with alignment.step(inputs):
        with torch.no_grad():
            teacher(**inputs)
        out = student(**inputs)
    return alignment.loss() + 0.01 * out.loss


def eager_loss(student: Any, weights_t: dict[int, Tensor], inputs: Batch) -> Tensor:
    """The same from whole maps."""
    out, weights_s = eager.attentions(student, inputs)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    matching = {layer: (layer,) for layer in weights_s}
    return eager.cosine_loss(weights_s, weights_t, matching, rows, columns) + 0.01 * out.loss


def measure_bf16(case: Case, *, left: bool) -> Result:
    """The same in bfloat16, against float64 softmaxes of the very q and k that attention received.

    (Eager attention itself rounds q k^T to bfloat16, and the models' other rounding would drown all.)
    """
    student, teacher = case.model(seed=2).train().bfloat16(), case.model(seed=1).bfloat16()
    inputs = case.batch(case.model(), left=left)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    reference = copy.deepcopy(student)
    with torch.no_grad():
        _, weights_t = eager.recorded(teacher, inputs)
    error = map_error(teacher, weights_t, inputs)
    loss = our_loss(student, teacher, inputs)
    loss.backward()
    out, weights_s = eager.recorded(reference, inputs)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    matching = {layer: (layer,) for layer in weights_s}
    loss_ref = eager.cosine_loss(weights_s, weights_t, matching, rows, columns) + 0.01 * out.loss
    loss_ref.backward()
    ours, theirs = eager.gradients(student), eager.gradients(reference)
    return Result(
        map=error,
        loss=float((loss - loss_ref).detach().abs() / loss_ref.detach().abs()),
        gradient=eager.relative_error(ours, theirs),
        size=loss_ref.item(),
    )


HEADER = """# Support matrix

Measured by `python -m tests.models.matrix` on tiny random-weight models (nothing is downloaded), batch
2, one image in the first sample and two in the second, float32 on a CPU; `tests/models/test_families.py`
asserts the limits. *map*: largest absolute difference between the captured head-mean map and the
model's own eager weights (limit 1e-5). *loss* and *gradient*: relative difference from the same
objective through eager attention with `output_attentions`, the gradient over all parameters of the
student as one vector (limit 1e-4), without and with gradient checkpointing. Each figure is the worst of
left and right padding. *base*: the attention that runs beneath; `eager` where transformers has no other.
*bf16*: the same models in bfloat16, against softmaxes in float64 of the very q and k that their attention
received, with the mask as it arrived (limits 1e-5 and 2e-2; eager attention itself rounds q k^T).

| family | base | what is peculiar | map | loss | gradient | with checkpointing | bf16 map | bf16 gradient |
|---|---|---|---|---|---|---|---|---|
"""

FOOTER = """
Attention sinks (GPT-OSS) take part in the softmax; the alignment gives the sink logits themselves no
gradient, and the comparison above leaves them out. Qwen3.5's linear-attention layers have no map.
Gemma 3 and 4 hide keys beyond the sliding window even inside an image; where an image is longer than
the window, this cannot be stated to the loss, and the step is refused. Flash attention, FlexAttention,
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
        f"{max(r.map for r in half):.1e}",
        f"{max(r.gradient for r in half):.1e}",
    ]
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    lines = []
    for case in CASES:
        lines.append(row(case))
        print(lines[-1], end="", flush=True)
    TABLE.write_text(HEADER + "".join(lines) + FOOTER)
