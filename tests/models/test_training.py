"""The machinery around a step: accumulation, PEFT, torch.compile, autocast, packing, generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastalign.models import AttentionAlignment
from tests.models import eager, tiny
from tests.models.test_llava import step

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def pair(**changes: Any) -> tuple[Any, Any]:
    return tiny.llava(seed=2, **changes).train(), tiny.llava(seed=1).eval()


def train_once(alignment: AttentionAlignment, student: Any, teacher: Any, inputs: Any) -> float:
    out = step(alignment, student, teacher, inputs)
    loss = out.loss + alignment.loss()
    loss.backward()
    return float(loss.detach())


def test_gradient_accumulation_with_generation_in_between() -> None:
    """Two batches, one a step each, with a generate() between forward and backward."""
    student, teacher = pair()
    batches = [tiny.batch(seed=1), tiny.batch(seed=2, images=(2, 1), lengths=(25, 14))]
    alignment = AttentionAlignment(student, teacher)
    separate = []
    for inputs in batches:
        student.zero_grad()
        train_once(alignment, student, teacher, inputs)
        separate.append(eager.gradients(student))
    student.zero_grad()
    for inputs in batches:
        out = step(alignment, student, teacher, inputs)
        prompt = {k: v for k, v in inputs.items() if k != "labels"}
        student.generate(**prompt, max_new_tokens=2, do_sample=False)
        (out.loss + alignment.loss()).backward()
    summed = {name: separate[0][name] + separate[1][name] for name in separate[0]}
    assert eager.relative_error(eager.gradients(student), summed) < 1e-6


def test_a_batch_of_samples_equals_its_samples() -> None:
    """The mean over the samples of one batch is the accumulation of samples divided by their count."""
    student, teacher = pair()
    inputs = tiny.batch(images=(1, 1), lengths=(20, 20))
    alignment = AttentionAlignment(student, teacher)
    step(alignment, student, teacher, inputs)
    alignment.loss().backward()
    whole = eager.gradients(student)
    student.zero_grad()
    for b in range(2):
        one = {k: v[b : b + 1] for k, v in inputs.items()}
        step(alignment, student, teacher, one)
        (alignment.loss() / 2).backward()
    assert eager.relative_error(eager.gradients(student), whole) < 1e-5


def test_a_student_inside_peft() -> None:
    from peft import LoraConfig, get_peft_model

    student, teacher = pair()
    inputs = tiny.batch()
    plain = AttentionAlignment(student, teacher)
    with torch.no_grad():
        step(plain, student, teacher, inputs)
    expected = plain.loss()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*\.(q_proj|k_proj)")
    wrapped = get_peft_model(student, config)
    alignment = AttentionAlignment(wrapped, teacher)
    step(alignment, wrapped, teacher, inputs)
    torch.testing.assert_close(alignment.loss().detach(), expected)  # LoRA starts at zero
    alignment.loss().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all("lora_B" in name for name in trained)
    assert any("layers.1.self_attn.k_proj" in name for name in trained)


def test_autocast_computes_the_loss_in_float32() -> None:
    """Within autocast the projections are bfloat16; the loss is that of those values, exactly."""
    student, teacher = pair()
    inputs = tiny.batch()
    alignment = AttentionAlignment(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        train_once(alignment, student, teacher, inputs)
    assert alignment.loss().dtype == torch.float32
    ours = eager.gradients(student)
    reference = copy.deepcopy(student)
    reference.zero_grad()
    rows, columns = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            _, weights_t = eager.recorded(teacher, inputs)
        out, weights_s = eager.recorded(reference, inputs)
    with torch.autocast("cpu", enabled=False):
        loss = eager.cosine_loss(weights_s, weights_t, alignment.matching, rows, columns)
    torch.testing.assert_close(alignment.loss().detach(), loss.detach(), rtol=1e-3, atol=1e-4)
    (out.loss + loss).backward()
    assert eager.relative_error(ours, eager.gradients(reference)) < 5e-2


def test_packed_sequences_see_their_own_only() -> None:
    """Positions that restart, no attention mask: transformers packs, and so does the visibility."""
    student, teacher = pair()
    inputs = tiny.batch(images=(1, 1), lengths=(16, 16))
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, 32),
        "labels": inputs["labels"].reshape(1, 32),
        "position_ids": torch.arange(16).repeat(1, 2),
        "use_cache": False,  # with a cache transformers does not look for packed sequences
        "pixel_values": inputs["pixel_values"],
    }
    per_row = {"spec": "tunix", "layers": {1: [1, 2], 3: 3}, "rows": "text"}
    alignment = AttentionAlignment(student, teacher, **per_row)
    losses = []
    for batch in (inputs, packed):
        student.zero_grad()
        out = step(alignment, student, teacher, batch)
        (0 * out.logits.sum() + alignment.loss()).backward()
        losses.append((alignment.loss().detach(), eager.gradients(student)))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-5, atol=1e-6)
    assert eager.relative_error(losses[1][1], losses[0][1]) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_optimizer_follows_the_alignment(checkpointing: bool) -> None:
    """The alignment term alone brings the student's maps to the teacher's."""
    student, teacher = pair()
    if checkpointing:
        tiny.checkpoint_layers(student)
    inputs = tiny.batch()
    alignment = AttentionAlignment(student, teacher, layers={1: 1})
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        step(alignment, student, teacher, inputs)
        alignment.loss().backward()
        optimizer.step()
        values.append(alignment.loss().item())
    assert values[-1] < 0.3 * values[0]


def test_learned_mixing_trains_its_matrix() -> None:
    student, teacher = pair()
    inputs = tiny.batch()
    alignment = AttentionAlignment(student, teacher, spec="align_kd", layers={0: [0, 1]})
    assert alignment.mix is not None
    assert alignment.mix["0"].shape == (4, 8)
    optimizer = torch.optim.Adam(alignment.mix.parameters(), lr=0.02)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        step(alignment, student, teacher, inputs)
        alignment.loss().backward()
        optimizer.step()
        values.append(alignment.loss().item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_a_teacher_in_inference_mode(backend: str) -> None:
    """What is kept of it takes part in the student's graph like any other tensor."""
    student, teacher = pair()
    inputs = tiny.batch()
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        student.zero_grad()
        alignment = AttentionAlignment(student, teacher, layers="all", backend=backend)
        with alignment.step(inputs):
            with mode():
                teacher(**inputs)
            out = student(**inputs)
        (out.loss + alignment.loss()).backward()
        found.append((alignment.loss().item(), eager.gradients(student)))
    assert found[1][0] == found[0][0]
    assert eager.relative_error(found[1][1], found[0][1]) < 1e-6
