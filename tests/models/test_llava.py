"""Capture and loss on LLaVA models against eager attention with whole maps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from fastalign import AlignSpec
from fastalign.models import AttentionAlignment, visual_attention
from tests.models import eager, tiny


def step(alignment: AttentionAlignment, student: Any, teacher: Any, inputs: Any) -> Any:
    with alignment.step(inputs):
        with torch.no_grad():
            teacher(**inputs)
        return student(**inputs)


@pytest.mark.parametrize("left", [False, True])
def test_the_captured_map_is_the_eager_one(left: bool) -> None:
    model, inputs = tiny.llava().eval(), tiny.batch(left=left)
    ours = visual_attention(model, inputs)
    assert model.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        _, weights = eager.attentions(eager.eager_copy(model), inputs)
    columns = eager.visual_mask(model, inputs)
    assert set(ours) == set(weights)
    for layer, map in ours.items():
        for b in range(2):
            valid = inputs["attention_mask"][b].bool()
            wanted = weights[layer].mean(1)[b][:, columns[b]]
            torch.testing.assert_close(
                map[b, valid, : wanted.shape[1]], wanted[valid], atol=1e-5, rtol=0
            )
            assert not map[b, ~valid].any()


def test_maps_of_each_head_and_of_chosen_rows() -> None:
    model, inputs = tiny.llava().eval(), tiny.batch()
    mean = visual_attention(model, inputs, layers=[2], rows="last")
    each = visual_attention(model, inputs, layers=[2], rows="last", heads="each")
    assert list(mean) == [2]
    assert mean[2].shape == (2, 1, 2 * tiny.PATCHES)
    assert each[2].shape == (2, 4, 1, 2 * tiny.PATCHES)
    torch.testing.assert_close(each[2].mean(1), mean[2])
    every = visual_attention(model, inputs, layers=[2])[2]
    last = inputs["attention_mask"].sum(-1) - 1
    torch.testing.assert_close(mean[2][:, 0], every[torch.arange(2), last])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", ["all", "response"])
def test_loss_and_all_gradients_are_those_of_eager(
    rows: str, left: bool, checkpointing: bool
) -> None:
    # other depth, heads, kv heads and head size: windows of 10 - 5 + 1 teacher layers
    teacher = tiny.llava(layers=8, heads=6, kv_heads=3, head_dim=4, seed=1).eval()
    student = tiny.llava(seed=2, text="qwen3").train()
    inputs = tiny.batch(left=left)
    reference = eager.eager_copy(student)
    if checkpointing:
        tiny.checkpoint_layers(student)

    alignment = AttentionAlignment(student, teacher, rows=rows)
    assert alignment.matching == {1: (2, 3, 4), 2: (3, 4, 5)}
    out = step(alignment, student, teacher, inputs)
    loss = out.loss + 2.0 * alignment.loss()
    loss.backward()

    out_ref, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(eager.eager_copy(teacher), inputs)
    chosen = inputs["labels"] != -100 if rows == "response" else inputs["attention_mask"].bool()
    columns = eager.visual_mask(student, inputs)
    align_ref = eager.cosine_loss(weights_s, weights_t, alignment.matching, chosen, columns)
    (out_ref.loss + 2.0 * align_ref).backward()

    assert 0.01 < align_ref.item() < 1
    torch.testing.assert_close(alignment.loss(), align_ref, rtol=1e-5, atol=1e-6)
    ours, theirs = eager.gradients(student), eager.gradients(reference)
    assert set(ours) == set(theirs)
    assert eager.relative_error(ours, theirs) < 1e-4
    assert all(p.grad is None for p in teacher.parameters())

    # and the alignment term has a gradient of its own that this would have seen missing
    student.zero_grad()
    step(alignment, student, teacher, inputs).loss.backward()
    assert eager.relative_error(eager.gradients(student), theirs) > 1e-2


@pytest.mark.parametrize(
    "rows", ["all", "visual", "text", "instruction", "last", "mask", "function"]
)
def test_every_choice_of_rows_is_the_loss_of_these_rows(rows: str) -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).eval()
    inputs = tiny.batch(left=True)
    valid, visual = inputs["attention_mask"].bool(), eager.visual_mask(student, inputs)
    response = inputs["labels"] != -100
    odd = torch.arange(valid.shape[1]).expand_as(valid) % 2 == 1
    chosen, rule = {
        "all": (valid, "all"),
        "visual": (visual, "visual"),
        "text": (valid & ~visual, "text"),
        "instruction": (valid & ~visual & ~response, "instruction"),
        "last": (torch.arange(valid.shape[1]).expand_as(valid) == valid.shape[1] - 1, "last"),
        "mask": (valid & odd, odd),
        "function": (valid & odd, lambda batch: odd & (batch["input_ids"] >= 0)),
    }[rows]
    alignment = AttentionAlignment(student, teacher, rows=rule)
    with torch.no_grad():
        step(alignment, student, teacher, inputs)
        _, weights_s = eager.attentions(eager.eager_copy(student), inputs)
        _, weights_t = eager.attentions(eager.eager_copy(teacher), inputs)
    expected = eager.cosine_loss(weights_s, weights_t, alignment.matching, chosen, visual)
    assert expected > 0.01
    torch.testing.assert_close(alignment.loss(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["compodistill_code", "klal", "minilm", "align_kd", "tinybert"])
def test_other_objectives_equal_the_core_on_hand_captured_projections(spec: str) -> None:
    """With equal layers on both sides every recipe runs; it is checked against the reference."""
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).train()
    inputs = tiny.batch()
    losses = {}
    for backend in ("tiled", "reference"):
        student.zero_grad()
        alignment = AttentionAlignment(
            student, teacher, spec=spec, layers="last:2", backend=backend
        )
        out = step(alignment, student, teacher, inputs)
        (0 * out.logits.sum() + alignment.loss()).backward()
        losses[backend] = alignment.loss().detach(), eager.gradients(student)
    torch.testing.assert_close(losses["tiled"][0], losses["reference"][0], rtol=1e-5, atol=1e-6)
    assert eager.relative_error(losses["tiled"][1], losses["reference"][1]) < 1e-4


def test_the_loss_is_zero_for_a_twin_and_for_text() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=1)
    alignment = AttentionAlignment(student, teacher, layers="all")
    step(alignment, student, teacher, tiny.batch())
    assert abs(alignment.loss().item()) < 1e-6
    assert alignment.metrics()["layer_3/similarity"] == pytest.approx(1, abs=1e-6)

    other = AttentionAlignment(tiny.llava(seed=2), teacher, layers="all")
    inputs = tiny.batch(images=(0, 0))
    out = step(other, other.student.model, teacher, inputs)
    (out.loss + other.loss()).backward()
    assert other.loss().item() == 0


def test_a_sample_without_an_image_beside_one_with() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    alignment = AttentionAlignment(student, teacher)
    both = tiny.batch(images=(1, 0), lengths=(20, 20))
    step(alignment, student, teacher, both)
    loss = alignment.loss().detach()
    alone = {k: v[:1] for k, v in both.items()}
    step(alignment, student, teacher, alone)
    torch.testing.assert_close(loss, alignment.loss().detach(), rtol=1e-5, atol=1e-6)


def test_metrics_and_reduction_over_layers() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    inputs = tiny.batch()
    values = {}
    for reduction in ("mean", "sum"):
        alignment = AttentionAlignment(
            student, teacher, layers={0: [1, 2], 3: 0}, layer_reduction=reduction
        )
        step(alignment, student, teacher, inputs)
        metrics = alignment.metrics()
        assert set(metrics) == {
            "loss",
            *(f"layer_{i}/{name}" for i in (0, 3) for name in ("loss", "similarity")),
        }
        assert metrics["layer_0/loss"] == pytest.approx(1 - metrics["layer_0/similarity"])
        assert metrics["loss"] == pytest.approx(alignment.loss().item())
        values[reduction] = metrics
    assert values["sum"]["loss"] == pytest.approx(2 * values["mean"]["loss"], rel=1e-5)
    layers = values["mean"]["layer_0/loss"], values["mean"]["layer_3/loss"]
    assert values["mean"]["loss"] == pytest.approx(sum(layers) / 2, rel=1e-5)

    kl = AlignSpec(normalize="visual", compare="row", divergence="kl")
    alignment = AttentionAlignment(student, teacher, spec=kl)
    step(alignment, student, teacher, inputs)
    assert set(alignment.metrics()) == {"loss", "layer_1/loss", "layer_2/loss"}


def test_without_gradients_the_loss_is_the_same() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).eval()
    inputs = tiny.batch()
    alignment = AttentionAlignment(student, teacher)
    step(alignment, student, teacher, inputs)
    with_gradients = alignment.loss()
    with torch.no_grad():
        step(alignment, student, teacher, inputs)
    assert with_gradients.requires_grad
    assert not alignment.loss().requires_grad
    torch.testing.assert_close(with_gradients.detach(), alignment.loss())


def test_the_second_backward_of_a_retained_graph_adds_the_same() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    alignment = AttentionAlignment(student, teacher)
    out = step(alignment, student, teacher, tiny.batch())
    loss = out.loss + alignment.loss()
    loss.backward(retain_graph=True)
    once = eager.gradients(student)
    loss.backward()
    twice = {name: g / 2 for name, g in eager.gradients(student).items()}
    assert eager.relative_error(twice, once) < 1e-6


def test_nothing_remains_after_a_step() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).eval()
    inputs = tiny.batch()
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    before = student.generate(**prompt, max_new_tokens=4, do_sample=False)
    config = student.config.to_json_string()
    alignment = AttentionAlignment(student, teacher)
    with torch.no_grad():
        step(alignment, student, teacher, inputs)
    assert student.config.text_config._attn_implementation == "sdpa"
    assert teacher.config.text_config._attn_implementation == "sdpa"
    assert student.config.to_json_string() == config
    assert alignment._step is not None
    assert not alignment._step.teacher_states
    alignment.release()
    with pytest.raises(RuntimeError, match="no step was completed"):
        alignment.loss()
    after = student.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(before, after)

    stop = pytest.raises(ZeroDivisionError)
    with stop, alignment.step(inputs), torch.no_grad():
        teacher(**inputs, past_key_values=1 // 0)
    assert student.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():  # and the next step works
        step(alignment, student, teacher, inputs)


def test_queries_and_keys_of_a_layer_are_gone_when_its_loss_is_formed() -> None:
    """Looked at from inside the student's forward, before each of its layers and at the end."""
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).train()
    tiny.checkpoint_layers(student)
    alignment = AttentionAlignment(student, teacher, layers="all", rows="response")
    alive: list[list[int]] = []
    with alignment.step(tiny.batch()) as running:
        with torch.no_grad():
            teacher(**tiny.batch())
        states = running.teacher_states
        assert all(state.q.shape[2] == 5 for state in states.values())  # of 29 rows
        kept = {i: (weakref.ref(state.q), weakref.ref(state.k)) for i, state in states.items()}

        def look(*_: object) -> None:
            alive.append([i for i, refs in kept.items() if any(ref() is not None for ref in refs)])

        for layer in student.get_decoder().layers:
            layer.register_forward_pre_hook(look)
        student(**tiny.batch())
        look()
    assert alive == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3], []]


def test_the_vision_tower_and_other_layers_are_left_alone() -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).eval()
    alignment = AttentionAlignment(student, teacher)
    inputs = tiny.batch()
    with torch.no_grad():
        plain = student(**inputs).logits
        assert torch.equal(step(alignment, student, teacher, inputs).logits, plain)
    with alignment.step(inputs):
        assert student.config.vision_config._attn_implementation == "sdpa"
        with torch.no_grad():
            teacher(**inputs)
            student(**inputs)
