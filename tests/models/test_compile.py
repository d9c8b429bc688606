"""Layers that are compiled: one graph each, the same loss and gradients, nothing new from step to step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.models import AttentionAlignment, visual_attention
from fastalign.models.view import ModelView
from tests.models import eager, matrix, tiny
from tests.models.test_training import pair, train_once
from tests.models.zoo import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def batch(**arguments: Any) -> dict[str, Any]:
    """Without a cache, whose slots transformers would compile into every layer for itself."""
    return {**tiny.batch(**arguments), "use_cache": False}


class Graphs:
    """A backend that keeps the graphs, and runs them with autograd traced ahead of time."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, graph: Any, examples: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.found.append(graph)
        return aot_eager(graph, examples)

    def captures(self) -> int:
        """Graphs that show a layer to its tap, also from within a checkpoint."""
        return sum(
            any("fastalign.see" in getattr(part, "code", "") for part in graph.modules())
            for graph in self.found
        )


def compile_layers(*models: Any, fullgraph: bool) -> Graphs:
    """Of layers with softmax attention: others (Qwen3.5's) transformers itself cannot compile on a CPU."""
    torch._dynamo.reset()
    graphs = Graphs()
    for model in models:
        view = ModelView("student", model)
        for i in view.attentions:
            view.layers[i].compile(fullgraph=fullgraph, backend=graphs)
    return graphs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_layers(fullgraph: bool, checkpointing: bool) -> None:
    student, teacher = pair()
    if checkpointing:
        tiny.checkpoint_layers(student)
    batches = [batch(seed=seed, left=bool(seed % 2)) for seed in range(4)]
    alignment = AttentionAlignment(student, teacher)
    expected = []
    for inputs in batches:
        student.zero_grad()
        expected.append((train_once(alignment, student, teacher, inputs), eager.gradients(student)))
    graphs = compile_layers(student, teacher, fullgraph=fullgraph)
    counts = []
    for inputs, (loss, gradients) in zip(batches, expected, strict=True):
        student.zero_grad()
        assert train_once(alignment, student, teacher, inputs) == pytest.approx(loss, rel=1e-5)
        assert eager.relative_error(eager.gradients(student), gradients) < 1e-4
        counts.append(len(graphs.found))
    assert graphs.captures() >= 2
    assert counts[1] == counts[-1]
    assert not any(hasattr(a, "_fastalign_link") for a in alignment.student.attentions.values())

    # accumulation: two forwards, then two backwards, each with its own gradients
    student.zero_grad()
    losses = []
    for inputs in batches[:2]:
        with alignment.step(inputs):
            with torch.no_grad():
                teacher(**inputs)
            out = student(**inputs)
        losses.append(out.loss + alignment.loss())
    for loss in losses:
        loss.backward()
    summed = {name: expected[0][1][name] + expected[1][1][name] for name in expected[0][1]}
    assert eager.relative_error(eager.gradients(student), summed) < 1e-4


QUICK = ("Qwen2-VL", "PaliGemma 2", "Gemma 3")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_compiled_layers_of_every_family(case: Case) -> None:
    """One graph a layer, M-RoPE, softcap, blocks, chunks and shared keys included."""
    student, teacher = case.model(seed=2).train(), case.model(seed=1)
    if case.name in ("LLaVA-1.5, gpt_oss text", "Llama 4"):
        student.set_experts_implementation("batched_mm")  # the eager one breaks graphs
    inputs = {**case.batch(student, left=True), "use_cache": False}
    reference = copy.deepcopy(student)
    expected = matrix.our_loss(reference, teacher, inputs)
    expected.backward()
    graphs = compile_layers(student, fullgraph=True)
    loss = matrix.our_loss(student, teacher, inputs)
    loss.backward()
    assert graphs.captures()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert eager.relative_error(eager.gradients(student), eager.gradients(reference)) < 1e-4


def test_a_compiled_model_outside_of_a_step_and_without_gradients() -> None:
    student, teacher = pair()
    inputs = batch()
    plain = AttentionAlignment(student, teacher)
    maps = visual_attention(teacher, inputs)
    with torch.no_grad():
        logits = student(**inputs).logits
        with plain.step(inputs):
            teacher(**inputs)
            student(**inputs)
    compile_layers(student, teacher, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, logits)
        alignment = AttentionAlignment(student, teacher)
        with alignment.step(inputs):
            teacher(**inputs)
            student(**inputs)
    torch.testing.assert_close(alignment.loss(), plain.loss())
    for layer, map in visual_attention(teacher, inputs).items():
        torch.testing.assert_close(map, maps[layer])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_learned_mix_over_compiled_layers(frozen: bool) -> None:
    student, teacher = pair()
    student.get_decoder().requires_grad_(not frozen)
    student.model.multi_modal_projector.requires_grad_(not frozen)
    student.model.vision_tower.requires_grad_(not frozen)
    inputs = batch()
    found = []
    for compiled in (False, True):
        if compiled:
            compile_layers(student, teacher, fullgraph=True)
        alignment = AttentionAlignment(student, teacher, spec="align_kd", layers={0: [0, 1]})
        assert alignment.mix is not None
        student.zero_grad()
        loss = train_once(alignment, student, teacher, inputs)
        found.append((loss, alignment.mix["0"].grad, eager.gradients(student)))
    assert found[0][1].abs().max() > 0
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1])
    assert eager.relative_error(found[1][2], found[0][2]) < 1e-4


def test_compiled_layers_that_nothing_in_front_of_them_trains() -> None:
    """Queries and keys without gradients: the loss is right, and no complaint about checkpoints."""
    student, teacher = pair()
    inputs = batch()
    alignment = AttentionAlignment(student, teacher)
    expected = train_once(alignment, student, teacher, inputs)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    compile_layers(student, teacher, fullgraph=True)
    assert train_once(alignment, student, teacher, inputs) == pytest.approx(expected, rel=1e-5)
    assert not alignment.loss().requires_grad


def test_a_compiled_student_without_its_teacher() -> None:
    student, teacher = pair()
    alignment, inputs = AttentionAlignment(student, teacher), batch()
    compile_layers(student, teacher, fullgraph=True)
    forgotten = pytest.raises(
        RuntimeError, match=r"student layer 1 ran before teacher layers \[1\]"
    )
    with forgotten, alignment.step(inputs):
        student(**inputs)


def test_a_compiled_loss_whose_step_was_let_go_of() -> None:
    student, teacher = pair()
    alignment, inputs = AttentionAlignment(student, teacher), batch()
    compile_layers(student, teacher, fullgraph=True)
    with alignment.step(inputs) as step:
        with torch.no_grad():
            teacher(**inputs)
        student(**inputs)
    for loss in step.losses.values():
        loss.grad_fn.metadata.clear()
    with pytest.raises(
        RuntimeError, match="the gradients of a compiled layer's alignment are gone"
    ):
        alignment.loss().backward()


@pytest.mark.slow
def test_layers_compiled_with_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Generated code uses the memory of q and k again as soon as it can."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing of an older version
    student, teacher = tiny.llava(seed=2, layers=2).train(), tiny.llava(seed=1, layers=2).eval()
    inputs = batch()
    alignment = AttentionAlignment(student, teacher, layers="all")
    loss = train_once(alignment, student, teacher, inputs)
    gradients = eager.gradients(student)
    torch._dynamo.reset()
    for model in (student, teacher):
        for layer in model.get_decoder().layers:
            layer.compile(fullgraph=True)
    for _ in range(2):
        student.zero_grad()
        assert train_once(alignment, student, teacher, inputs) == pytest.approx(loss, rel=1e-5)
        assert eager.relative_error(eager.gradients(student), gradients) < 1e-4
