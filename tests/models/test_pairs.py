"""Students and teachers of different families, layers that see different tokens, other patch grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.models import AttentionAlignment
from fastalign.models.grids import area_weights
from tests.models import eager, tiny
from tests.models.zoo import CASES, Batch

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
    for name in [name for name in theirs if name.endswith(".sinks")]:
        del ours[name], theirs[name]
    assert eager.relative_error(ours, theirs) < 1e-4


# --------------------------------------------------------------------------------- grids


def test_area_weights_keep_mass_and_know_simple_cases() -> None:
    same = area_weights((1, 3, 2), (1, 3, 2))
    torch.testing.assert_close(same, torch.eye(6))
    halves = area_weights((1, 1, 2), (1, 1, 1))
    assert halves.tolist() == [[1, 1]]
    spread = area_weights((1, 1, 1), (1, 2, 2))
    assert spread.flatten().tolist() == [0.25] * 4
    thirds = area_weights((1, 1, 2), (1, 1, 3))
    torch.testing.assert_close(thirds, torch.tensor([[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]]))
    video = area_weights((2, 2, 3), (2, 5, 4))
    assert video.shape == (40, 12)
    torch.testing.assert_close(video.sum(0), torch.ones(12))
    assert not video[:20, 6:].any()
    with pytest.raises(ValueError, match="2 frames in the teacher and 3 in the student"):
        area_weights((2, 1, 1), (3, 1, 1))


@pytest.mark.parametrize("teacher", ["InternVL", "Qwen2-VL"])
def test_a_teacher_with_another_grid(teacher: str) -> None:
    """3 x 3 patches of LLaVA <- 2 x 2 of InternVL, 2 x 2 and 2 x 3 of Qwen2-VL; padded apart."""
    case_s, case_t = BY_NAME["LLaVA-1.5, llama text"], BY_NAME[teacher]
    student, model_t = case_s.model(seed=2).train(), case_t.model(seed=1)
    inputs, other = case_s.batch(student, left=False), case_t.batch(model_t, left=True)
    reference, teacher_ref = eager.eager_copy(student), eager.eager_copy(model_t)
    alignment = AttentionAlignment(
        student, model_t, layers={1: [1, 2], 3: 3}, rows="text", resample="area"
    )
    loss = run(alignment, student, model_t, inputs, other)
    loss.backward()

    out, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, other)
    columns, columns_t = eager.visual_mask(student, inputs), eager.visual_mask(model_t, other)
    rows = inputs["attention_mask"].bool() & ~columns
    rows_t = other["attention_mask"].bool() & ~columns_t
    wide = (1, 2, 3) if teacher == "Qwen2-VL" else (1, 2, 2)
    grids = [[(1, 2, 2)], [wide, (1, 2, 2)]]  # the second image of the batch is the wide one
    losses = []
    for layer, group in alignment.matching.items():
        terms = []
        for b in range(2):
            s = weights_s[layer].mean(1)[b][rows[b]][:, columns[b]]
            t = torch.stack([weights_t[j].mean(1) for j in group]).mean(0)
            t = t[b][rows_t[b]][:, columns_t[b]]
            matrix = torch.block_diag(*[area_weights(g, (1, 3, 3)) for g in grids[b]])
            t = (t @ matrix.T * (s > 0)).flatten()
            terms.append(1 - s.flatten() @ t / (s.norm() * t.norm()))
        losses.append(torch.stack(terms).mean())
    expected = torch.stack(losses).mean() + 0.01 * out.loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert eager.relative_error(eager.gradients(student), eager.gradients(reference)) < 1e-4


def test_what_resampling_refuses() -> None:
    case_s, case_t = BY_NAME["LLaVA-1.5, llama text"], BY_NAME["InternVL"]
    student, teacher = case_s.model(seed=2), case_t.model(seed=1)
    inputs, other = case_s.batch(student, left=False), case_t.batch(teacher, left=False)
    with pytest.raises(ValueError, match=r"student \[9, 18\], teacher \[4, 8\]"):
        run(AttentionAlignment(student, teacher), student, teacher, inputs, other)
    alignment = AttentionAlignment(student, teacher, resample="area")
    with pytest.raises(ValueError, match="rows hold visual tokens and the patch grids differ"):
        run(alignment, student, teacher, inputs, other)
    alignment = AttentionAlignment(student, teacher, resample="area", rows="text")
    longer = case_t.batch(teacher, left=False, counts=(2, 1))
    with pytest.raises(ValueError, match="text tokens per sample: student"):
        run(alignment, student, teacher, inputs, longer)
    tiled = BY_NAME["LLaVA-NeXT"]
    model = tiled.model()
    alignment = AttentionAlignment(student, model, resample="area", rows="text")
    with pytest.raises(ValueError, match="an image has 30 tokens, which is no square grid"):
        run(alignment, student, model, inputs, tiled.batch(model, left=False))
    assert tiny.PATCHES == 9
