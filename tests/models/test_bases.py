"""The attention beneath: flash attention 2, 3 and of the hub, FlexAttention and its log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import AlignSpec
from fastalign.models import AttentionAlignment, visual_attention
from tests.models import bases, eager, matrix, tiny
from tests.models.zoo import CASES

BY_NAME = {case.name: case for case in CASES}


def switch(model: Any, base: str) -> Any:
    """The decoder runs ``base``; transformers' own check would ask for a GPU."""
    model.config.get_text_config()._attn_implementation = base
    return model


def assert_equal_to_eager(
    student: Any, teacher: Any, inputs: dict[str, Tensor], reference: dict[str, Tensor]
) -> None:
    """Maps, loss and gradients of every layer; ``reference``: the batch of the eager models."""
    student_ref, teacher_ref = eager.eager_copy(student), eager.eager_copy(teacher)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, reference)
    assert matrix.map_error(teacher, weights_t, inputs) < 1e-5
    loss = matrix.our_loss(student, teacher, inputs)
    loss.backward()
    expected = matrix.eager_loss(student_ref, weights_t, reference)
    expected.backward()
    assert expected > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    ours, theirs = eager.gradients(student), eager.gradients(student_ref)
    assert eager.relative_error(ours, theirs) < 1e-4


# --------------------------------------------------------------------------------- flash


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("LLaVA-1.5, llama text", "flash_attention_2"),
        ("LLaVA-1.5, mistral text", "flash_attention_3"),  # sliding
        ("LLaVA-1.5, gemma2 text", "flash_attention_2"),  # softcap
        ("LLaVA-1.5, gpt_oss text", bases.HUB),  # sinks
        ("Qwen2-VL", bases.HUB),
    ],
)
def test_flash_attention(name: str, base: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that arrives is [B, L] padding, and the kernel sees no padding at all."""
    bases.use_flash(monkeypatch)
    case = BY_NAME[name]
    student, teacher = (switch(case.model(seed), base) for seed in (2, 1))
    inputs = case.batch(student, left=left)
    assert_equal_to_eager(student.train(), teacher, inputs, inputs)


def test_flash_attention_drops_bidirectional_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's images see themselves both ways, but not in flash attention: nor in the loss."""
    bases.use_flash(monkeypatch)
    case = BY_NAME["Gemma 3"]
    student, teacher = (switch(case.model(seed), "flash_attention_2") for seed in (2, 1))
    inputs = case.batch(student, left=True)
    causal = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert_equal_to_eager(student.train(), teacher, inputs, causal)


@pytest.mark.parametrize("told", ["positions", "cu_seq_lens", "cu_seq_lens of a batch"])
def test_packed_sequences(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention finds packed sequences by itself; the loss is that of the samples apart."""
    bases.use_flash(monkeypatch)
    apart = tiny.batch(images=(1, 1, 1, 1), lengths=(16, 16, 16, 16))
    packed: dict[str, Any] = {
        "input_ids": apart["input_ids"].reshape(1, 64),
        "labels": apart["labels"].reshape(1, 64),
        "position_ids": torch.arange(16).repeat(1, 4),
        "pixel_values": apart["pixel_values"],
    }
    if told != "positions":
        starts = torch.arange(0, 65, 16, dtype=torch.int32)
        packed |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        packed |= {"max_length_q": 16, "max_length_k": 16}
    if told == "cu_seq_lens of a batch":
        for name in ("input_ids", "labels", "position_ids"):
            packed[name] = packed[name].reshape(2, 32)
    student, teacher = (switch(tiny.llava(seed=s), "flash_attention_2") for s in (2, 1))
    found = []
    for inputs in (apart, packed):
        student.zero_grad()
        alignment = AttentionAlignment(student, teacher, "tunix", {1: [1, 2], 3: 3}, "text")
        with alignment.step(inputs):
            with torch.no_grad():
                teacher(**inputs)
            out = student(**inputs)
        (0 * out.logits.sum() + alignment.loss()).backward()
        found.append((alignment.loss().detach(), eager.gradients(student)))
    assert found[0][0] > 0.01
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert eager.relative_error(found[1][1], found[0][1]) < 1e-4


def test_packed_sequences_that_run_over_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    bases.use_flash(monkeypatch)
    model = switch(tiny.llava(), "flash_attention_2")
    apart = tiny.batch(images=(1, 1), lengths=(16, 16))
    starts = torch.tensor([0, 10, 32], dtype=torch.int32)
    inputs = {k: v for k, v in apart.items() if k != "attention_mask"}
    inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    inputs |= {"max_length_q": 22, "max_length_k": 22}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is \[0, 10, 32\] .* end where a sample"):
        visual_attention(model, inputs)


@pytest.mark.parametrize("base", ["flash_attention_2", bases.HUB])
def test_the_base_receives_what_it_would_receive_without_us(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument of every call, and the name of the base in the module's configuration."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    bases.use_flash(monkeypatch)
    calls: list[dict[str, Any]] = []
    inner = ALL_ATTENTION_FUNCTIONS[base]

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:
        name = module.config._attn_implementation
        calls.append({"q": query, "k": key, "v": value, "mask": mask, "name": name, **kw})
        return inner(module, query, key, value, mask, **kw)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, base, spy)
    model, inputs = switch(tiny.llava(), base), tiny.batch(left=True)
    with torch.no_grad():
        model(**inputs)
    plain, calls[:] = list(calls), []
    visual_attention(model, inputs)
    assert len(calls) == len(plain) == 4
    for ours, theirs in zip(calls, plain, strict=True):
        assert ours["name"] == base
        assert set(ours) == set(theirs)
        assert theirs["mask"].shape == (2, 29)
        for name, value in theirs.items():
            same = torch.equal(ours[name], value) if isinstance(value, Tensor) else None
            assert same or ours[name] == value, name


def test_a_base_that_the_decoder_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers refuses it when asked; a configuration that was changed by hand is refused here."""
    bases.use_flash(monkeypatch)
    llama4 = BY_NAME["Llama 4"].model()
    inputs = BY_NAME["Llama 4"].batch(llama4, left=False)
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        llama4.set_attn_implementation({"text_config": "flash_attention_2"})
    message = "teacher: the attention implementation is {!r}, which .* allowed: 'eager', {}"
    for base in ("flash_attention_2", bases.HUB):
        switch(llama4, base)
        with pytest.raises(ValueError, match=message.format(base, "'sdpa', 'flex_attention'")):
            visual_attention(llama4, inputs)
    gemma2 = BY_NAME["LLaVA-1.5, gemma2 text"].model()
    switch(gemma2, "sdpa")
    with pytest.raises(ValueError, match=message.format("sdpa", "'flash', 'flex_attention'")):
        visual_attention(gemma2, tiny.batch())

    # a decoder that says it could, but whose chunks flash attention leaves out
    monkeypatch.setattr(type(llama4.get_decoder()), "_supports_flash_attn", True)
    switch(llama4, "flash_attention_2")
    with pytest.raises(ValueError, match="has chunked attention, which flash attention leaves out"):
        visual_attention(llama4, inputs)


# ---------------------------------------------------------------------------------- flex


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["LLaVA-1.5, gemma2 text", "Gemma 3", "LLaVA-1.5, mistral text"])
def test_flex_attention_as_the_teacher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own kernel (on a CPU without gradients): softcap, blocks, windows, its BlockMask."""
    bases.use_flex(monkeypatch)
    case = BY_NAME[name]
    student, teacher = case.model(2).train(), switch(case.model(1), "flex_attention")
    inputs = case.batch(student, left=True)
    assert_equal_to_eager(student, teacher, inputs, inputs)


def test_a_block_mask_that_the_descriptors_do_not_explain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bases.use_flex(monkeypatch)
    case = BY_NAME["Gemma 3"]
    model = switch(case.model(), "flex_attention")
    inputs = case.batch(model, left=False)
    from fastalign.models.families import FAMILIES, Family

    monkeypatch.setitem(FAMILIES, "gemma3", Family(("gemma3",)))  # without its blocks
    with pytest.raises(RuntimeError, match=r"layer 0 .* differs from the model's mask"):
        visual_attention(model, inputs)


@pytest.mark.parametrize("rows", ["all", "response"])
@pytest.mark.parametrize("name", ["LLaVA-1.5, llama text", "LLaVA-1.5, gpt_oss text", "Gemma 3"])
def test_a_returned_lse_stands_for_our_own(
    name: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of two teacher layers, sinks and sliced rows included."""
    case = BY_NAME[name]
    results = {}
    for error in (0.0, 0.5):
        bases.use_flex(monkeypatch, lse_error=error)
        student, teacher = (switch(case.model(s), "flex_attention") for s in (2, 1))
        inputs = case.batch(student, left=True)
        student_ref, teacher_ref = eager.eager_copy(student), eager.eager_copy(teacher)
        alignment = AttentionAlignment(student, teacher, "tunix", {0: [0, 2], 1: 1}, rows)
        reference = AttentionAlignment(student_ref, teacher_ref, "tunix", {0: [0, 2], 1: 1}, rows)
        for each, s, t in ((alignment, student, teacher), (reference, student_ref, teacher_ref)):
            with each.step(inputs):
                with torch.no_grad():
                    t(**inputs)
                out = s(**inputs)
            (0 * out.logits.sum() + each.loss()).backward()
        results[error] = alignment.loss().item(), reference.loss().item()
        gradients = eager.gradients(student), eager.gradients(student_ref)
        if not error:
            assert eager.relative_error(*gradients) < 1e-4
    ours, own = results[0.0]
    assert ours == pytest.approx(own, rel=1e-4)
    # tunix renormalises; the loss of whole maps shows that the number was taken
    assert results[0.5][1] == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "used"),
    [
        (AlignSpec(divergence="mse", compare="row"), True),
        (AlignSpec(divergence="mse", compare="row", normalize="visual_per_head"), False),
        (AlignSpec(divergence="mse", compare="row", temperature=2.0), False),
    ],
    ids=["joint", "other softmax", "temperature"],
)
def test_a_returned_lse_is_used_where_the_softmax_is_the_attentions_own(
    spec: AlignSpec, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = []
    for error in (0.0, 0.5):
        bases.use_flex(monkeypatch, lse_error=error)
        student, teacher = (switch(tiny.llava(seed=s), "flex_attention") for s in (2, 1))
        alignment, inputs = AttentionAlignment(student, teacher, spec), tiny.batch()
        with alignment.step(inputs), torch.no_grad():
            teacher(**inputs)
            student(**inputs)
        values.append(alignment.loss().item())
    # probabilities smaller by exp(-0.5) on both sides
    factor = torch.tensor(-1.0).exp().item() if used else 1
    assert values[1] == pytest.approx(factor * values[0], rel=1e-4)


def test_a_rounded_lse_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention rounds it to the type of the values: in bfloat16 it would be wrong by percents."""
    maps = []
    for error in (0.0, 0.5):
        bases.use_flex(monkeypatch, lse_error=error)
        student, teacher = (switch(tiny.llava(seed=s), "flex_attention").bfloat16() for s in (2, 1))
        inputs = tiny.batch()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        alignment = AttentionAlignment(student, teacher)
        with alignment.step(inputs), torch.no_grad():
            teacher(**inputs)
            student(**inputs)
        maps.append(alignment.loss().item())
    assert maps[0] == maps[1] > 0
