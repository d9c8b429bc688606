"""Teacher's adapter fetch: the function, the checkpoint, what can be folded and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from fastalign.distill.loading import choose_trained
from fastalign.distill.stages import PRESETS
from fastalign.distill.taf import (
    TafLlavaForConditionalGeneration,
    fetch_adapter,
    fold,
    to_stock,
)

from ..models import tiny


def models(student_heads: int, adapter: str = "linear"):  # type: ignore[no-untyped-def]
    student = tiny.llava(layers=2, heads=student_heads)
    teacher = tiny.llava(layers=3, heads=4, seed=1)
    for module in teacher.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
            torch.nn.init.normal_(module.bias, std=0.3)
    return fetch_adapter(student, teacher, adapter=adapter), teacher


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_is_the_adapter_after_the_teachers_projector(adapter: str) -> None:
    taf, teacher = models(2, adapter)
    z = torch.randn(1, 9, 16)
    own = taf.model.multi_modal_projector
    torch.testing.assert_close(own(z), own.adapter(teacher.model.multi_modal_projector(z)))
    trainable = [n for n, p in taf.named_parameters() if p.requires_grad and "projector" in n]
    assert trainable and all(".adapter." in n for n in trainable)
    batch = tiny.batch()
    taf(**batch).loss.backward()
    assert all(p.grad.norm() > 0 for p in own.adapter.parameters())
    assert all(p.grad is None for p in own.fetched.parameters())


def test_saves_loads_and_generates(tmp_path: Path) -> None:
    taf, _ = models(2)
    batch = tiny.batch(images=(1, 1), lengths=(17, 17))
    batch.pop("labels")
    before = taf.eval()(**batch).logits
    taf.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is TafLlavaForConditionalGeneration
    assert torch.equal(loaded(**batch).logits, before)
    choose_trained(loaded, PRESETS["dpt"])
    trained = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert trained == [f"model.multi_modal_projector.adapter.{n}" for n in ("weight", "bias")]
    tokens = loaded.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, taf.generate(**batch, max_new_tokens=3, do_sample=False))


def test_folded_is_the_same_function(tmp_path: Path) -> None:
    taf, _ = models(2)
    batch = tiny.batch()
    folded = fold(taf)
    torch.testing.assert_close(folded(**batch).logits, taf.eval()(**batch).logits)
    assert len(list(folded.model.multi_modal_projector.parameters())) == 4
    folded.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, folded(**batch).logits)
    with pytest.raises(ValueError, match="'mlp'; allowed: 'linear'"):
        fold(models(2, "mlp")[0])


@pytest.mark.parametrize("heads", [4, 6])
def test_a_teacher_not_wider_exports_to_stock_llava(tmp_path: Path, heads: int) -> None:
    taf, _ = models(heads)
    batch = tiny.batch()
    to_stock(taf).save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(stock) is LlavaForConditionalGeneration
    torch.testing.assert_close(stock(**batch).logits, taf.eval()(**batch).logits)


def test_a_wider_teacher_exports_if_enough_of_its_units_are_idle(tmp_path: Path) -> None:
    """32 units for a student of width 16: 9 that nobody reads, 4 that see nothing, 3 that are copies."""
    taf, _ = models(2)
    folded = fold(taf)
    projector = folded.model.multi_modal_projector
    look, read = projector.fetched["linear_1"], projector.adapter
    with torch.no_grad():
        read.weight[:, 3:12] = 0
        look.weight[20:24] = 0
        for copy_ in (29, 30, 31):
            look.weight[copy_], look.bias[copy_] = look.weight[0], look.bias[0]
    batch = tiny.batch()
    to_stock(folded).save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(stock) is LlavaForConditionalGeneration
    torch.testing.assert_close(stock(**batch).logits, folded(**batch).logits)
    with torch.no_grad():
        read.weight[:, 3] = 1  # one more is needed
    with pytest.raises(
        ValueError, match="17 of the fetched projector's 32 hidden units are needed"
    ):
        to_stock(folded)


def test_a_wider_teacher_does_not_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"32 hidden units are needed and a stock LLaVA .* has 16"):
        to_stock(models(2)[0])


def test_other_models_are_refused() -> None:
    taf, teacher = models(2)
    with pytest.raises(TypeError, match="the student is a TafLlava"):
        fetch_adapter(taf, teacher)
