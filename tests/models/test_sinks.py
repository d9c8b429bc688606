"""The gradient of a student's attention sinks, eager, checkpointed and compiled, against eager weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import AlignSpec
from fastalign.models import AttentionAlignment
from tests.models import eager, tiny
from tests.models.test_compile import compile_layers
from tests.models.zoo import CASES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASE = next(case for case in CASES if case.name == "LLaVA-1.5, gpt_oss text")
MATCHING = {1: [0, 1], 3: [3]}


def sinks(model: Any) -> dict[str, Tensor]:
    return {n: g for n, g in eager.gradients(model).items() if n.endswith("sinks")}


def align(alignment: AttentionAlignment, student: Any, teacher: Any, inputs: Any) -> Tensor:
    with alignment.step(inputs):
        with torch.no_grad():
            teacher(**inputs)
        student(**inputs)
    return alignment.loss()


@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "sinks alone train"])
@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled", "compiled and checkpointed"])
def test_sinks_learn_as_they_do_through_eager_weights(how: str, frozen: bool) -> None:
    """Of the alignment alone, and of these parameters alone, whose share of all gradients is small."""
    student, teacher = CASE.model(seed=2).train(), CASE.model(seed=1)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not frozen or name.endswith("sinks"))
    inputs = {**CASE.batch(student, left=True), "use_cache": False}
    reference, teacher_ref = eager.eager_copy(student), eager.eager_copy(teacher)
    if "checkpointed" in how:
        tiny.checkpoint_layers(student)
    if "compiled" in how:
        student.set_experts_implementation("batched_mm")  # the eager one breaks graphs
        graphs = compile_layers(student, fullgraph=True)
    alignment = AttentionAlignment(student, teacher, layers=MATCHING, rows="response")
    loss = align(alignment, student, teacher, inputs)
    loss.backward()
    if "compiled" in how:
        assert graphs.captures()

    _, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, inputs)
    rows, columns = inputs["labels"] != -100, eager.visual_mask(student, inputs)
    expected = eager.cosine_loss(weights_s, weights_t, alignment.matching, rows, columns)
    expected.backward()
    assert expected > 0.05
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = sinks(student), sinks(reference)
    assert (
        set(ours) == set(theirs) and len(theirs) == 4
    )  # every layer's are in front of layer 3's map
    assert all(bool(gradient.any()) for gradient in theirs.values())
    assert eager.relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_sinks_take_no_part_where_scores_are_compared(backend: str) -> None:
    """Layer 0's scores do not know of them, and those in front of layer 2 still train."""
    spec = AlignSpec(compare="row", divergence="mse", normalize="none")
    student, teacher = CASE.model(seed=2).train(), CASE.model(seed=1)
    inputs = CASE.batch(student, left=False)
    alignment = AttentionAlignment(student, teacher, spec, layers={0: 0}, backend=backend)
    loss = align(alignment, student, teacher, inputs)
    assert loss > 0.1
    for model in (student, teacher):
        for layer in model.get_decoder().layers:
            layer.self_attn.sinks.data.fill_(3.0)
    assert align(alignment, student, teacher, inputs) == loss
    alignment = AttentionAlignment(student, teacher, spec, layers={2: 2}, backend=backend)
    align(alignment, student, teacher, inputs).backward()
    assert [name.split(".")[3] for name in sinks(student)] == ["0", "1"]
