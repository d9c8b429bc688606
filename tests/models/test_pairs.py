"""Students and teachers of different families, layers that see different tokens, other patch grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.models import AttentionAlignment
from tests.models import eager, tiny
from tests.models.zoo import CASES, SIGLIP_LLAMA, SIGLIP_QWEN3, Batch

BY_NAME = {case.name: case for case in CASES}


def run(alignment: Any, student: Any, teacher: Any, inputs: Batch, other: Batch) -> Tensor:
    with alignment.step(inputs, teacher_inputs=other):
        with torch.no_grad():
            teacher(**other)
        out = student(**inputs)
    return alignment.loss() + 0.01 * out.loss


def visible_cosine(
    weights_s: Mapping[int, Tensor],
    weights_t: Mapping[int, Tensor],
    matching: Mapping[int, Sequence[int]],
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """``eager.cosine_loss``; what the student's layer cannot see is not compared."""
    losses = []
    for layer, group in matching.items():
        s = weights_s[layer].mean(1)
        t = torch.stack([weights_t[j].mean(1) for j in group]).mean(0) * (s > 0)
        one = {0: s.unsqueeze(1)}, {0: t.unsqueeze(1)}
        losses.append(eager.cosine_loss(*one, {0: (0,)}, rows, columns))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("InternVL", "Gemma 3"),  # full causal <- sliding with bidirectional images
        ("Gemma 4, bidirectional", "InternVL"),
        ("Aya Vision", "Llama 4"),  # sliding <- chunked
        ("LLaVA-1.5, llama text", "PaliGemma 2"),  # <- prefix, softcap, sliding, eager
        ("LLaVA-1.5, gemma2 text", "LLaVA-1.5, gpt_oss text"),  # <- sinks
        ("LLaVA-1.5, gpt_oss text", "LLaVA-1.5, qwen3 text"),
    ],
)
def test_pairs_of_families(student: str, teacher: str, left: bool) -> None:
    """Windows mix sliding and full layers; loss and gradients are those of eager attention."""
    case_s, case_t = BY_NAME[student], BY_NAME[teacher]
    model_s, model_t = case_s.model(seed=2).train(), case_t.model(seed=1)
    inputs = case_s.batch(model_s, left=left)
    other = {**case_t.batch(model_t, left=left)}
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(inputs[name], other[name])
    reference, teacher_ref = eager.eager_copy(model_s), eager.eager_copy(model_t)
    matching = {0: (0, 1), 2: (1, 2, 3), 3: (3,)}
    alignment = AttentionAlignment(model_s, model_t, layers=matching)
    loss = run(alignment, model_s, model_t, inputs, other)
    loss.backward()

    out, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, other)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(model_s, inputs)
    expected = visible_cosine(weights_s, weights_t, matching, rows, columns) + 0.01 * out.loss
    expected.backward()
    assert expected > 0.05
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = eager.gradients(model_s), eager.gradients(reference)
    assert eager.relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_decoders_depths_heads_and_head_sizes(checkpointing: bool) -> None:
    """A SigLIP + Qwen3 teacher over a SigLIP + Llama student, by the paper's matching."""
    student, teacher = SIGLIP_LLAMA.model(seed=2).train(), SIGLIP_QWEN3.model(seed=1)
    inputs = SIGLIP_LLAMA.batch(student, left=checkpointing)
    reference, teacher_ref = eager.eager_copy(student), eager.eager_copy(teacher)
    if checkpointing:
        tiny.checkpoint_layers(student)
    alignment = AttentionAlignment(student, teacher)
    assert alignment.matching == {1: (2, 3), 2: (3, 4), 3: (4, 5)}
    loss = run(alignment, student, teacher, inputs, inputs)
    loss.backward()

    out, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, inputs)
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    expected = eager.cosine_loss(weights_s, weights_t, alignment.matching, rows, columns)
    (expected + 0.01 * out.loss).backward()
    assert expected > 0.05
    torch.testing.assert_close(alignment.loss(), expected, rtol=1e-5, atol=1e-6)
    assert eager.relative_error(eager.gradients(student), eager.gradients(reference)) < 1e-4
