"""What is refused, and that the message names what came and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fastalign.models import AttentionAlignment, Family, visual_attention
from tests.models import tiny


def run(alignment: AttentionAlignment, inputs: Any, *models: Any, other: Any = None) -> None:
    """A step in which ``models`` run, one after the other."""
    with alignment.step(inputs, teacher_inputs=other):
        for model in models:
            model(**inputs)


@pytest.fixture
def models() -> tuple[Any, Any]:
    return tiny.llava(seed=2), tiny.llava(seed=1).eval()


def test_importing_does_not_import_transformers() -> None:
    code = (
        "import sys, fastalign, fastalign.models; "
        "assert not {'transformers', 'triton', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forgotten_teacher(models: tuple[Any, Any]) -> None:
    student, teacher = models
    alignment, inputs = AttentionAlignment(student, teacher), tiny.batch()
    with pytest.raises(RuntimeError, match=r"student layer 1 ran before teacher layers \[1\]"):
        run(alignment, inputs, student)
    with pytest.raises(RuntimeError, match="no step was completed"):
        alignment.loss()
    with pytest.raises(RuntimeError, match=r"student layers \[1, 2\] did not run"):
        run(alignment, inputs, teacher)


def test_a_model_that_runs_twice(models: tuple[Any, Any]) -> None:
    student, teacher = models
    alignment, inputs = AttentionAlignment(student, teacher), tiny.batch()
    with pytest.raises(RuntimeError, match="teacher layer 1 ran twice"):
        run(alignment, inputs, teacher, teacher)
    with pytest.raises(RuntimeError, match="student layer 1 ran twice"):
        run(alignment, inputs, teacher, student, student)


def test_steps_do_not_nest(models: tuple[Any, Any]) -> None:
    alignment, inputs = AttentionAlignment(*models), tiny.batch()

    def nested() -> None:
        with alignment.step(inputs):
            run(AttentionAlignment(*models), inputs)

    with pytest.raises(RuntimeError, match="captured already"):
        nested()
    for model in models:
        assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing(models: tuple[Any, Any]) -> None:
    student, teacher = models
    student.train()
    tiny.checkpoint_layers(student, reentrant=True)
    alignment, inputs = AttentionAlignment(student, teacher), tiny.batch()
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        run(alignment, inputs)
    # one that no attribute tells of
    for layer in alignment.student.layers.values():
        layer._gradient_checkpointing_func = _hidden_reentrant
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        run(alignment, inputs, teacher, student)


def _hidden_reentrant(function: Any, *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, use_reentrant=True)


def test_image_tokens_that_differ(models: tuple[Any, Any]) -> None:
    student, teacher = models
    alignment = AttentionAlignment(student, teacher)
    one, two = tiny.batch(images=(1, 1)), tiny.batch(images=(1, 2))
    with pytest.raises(ValueError, match=r"student \[9, 9\], teacher \[9, 18\]"):
        run(alignment, one, other=two)
    shorter = {k: v[:, :20] if v.dim() == 2 else v for k, v in one.items()}
    with pytest.raises(ValueError, match=r"batches of \[2, 20\] and \[2, 29\]"):
        run(alignment, shorter, other=one)


def test_batches_that_lack_something(models: tuple[Any, Any]) -> None:
    student, teacher = models
    alignment = AttentionAlignment(student, teacher, rows="response")
    inputs = tiny.batch()
    with pytest.raises(ValueError, match=r"inputs\['input_ids'\] is NoneType"):
        run(alignment, {})
    with pytest.raises(ValueError, match=r"rows is 'response' and inputs have no labels"):
        run(alignment, {k: v for k, v in inputs.items() if k != "labels"})
    with pytest.raises(ValueError, match=r"inputs\['attention_mask'\] is shape \[2, 1, 29, 29\]"):
        run(alignment, {**inputs, "attention_mask": torch.ones(2, 1, 29, 29)})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("some", ValueError, "rows is 'some'; allowed: 'all', 'visual'"),
        ("all:0", ValueError, "allowed after the colon: a number of rows"),
        ("all:x", ValueError, "allowed after the colon: a number of rows"),
        (torch.ones(2, 29), TypeError, "rows gives torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"a mask of shape \[2, 3\]"),
        (3, TypeError, "rows gives int"),
        (lambda inputs: None, TypeError, "rows gives function"),
    ],
)
def test_rows(models: tuple[Any, Any], rows: Any, error: type, message: str) -> None:
    student, teacher = models
    alignment = AttentionAlignment(student, teacher, rows=rows)
    with pytest.raises(error, match=message):
        run(alignment, tiny.batch())


def test_models_and_layers_that_do_not_fit(models: tuple[Any, Any]) -> None:
    student, teacher = models
    with pytest.raises(ValueError, match="teacher is the student itself"):
        AttentionAlignment(student, student)
    with pytest.raises(TypeError, match="student is Linear; allowed: a transformers"):
        AttentionAlignment(torch.nn.Linear(2, 2), teacher)
    with pytest.raises(ValueError, match="spec is 'unknown'"):
        AttentionAlignment(student, teacher, spec="unknown")
    with pytest.raises(ValueError, match="layer_reduction is 'max'"):
        AttentionAlignment(student, teacher, layer_reduction="max")
    with pytest.raises(ValueError, match="resample is 'bilinear'; allowed: None or 'area'"):
        AttentionAlignment(student, teacher, resample="bilinear")
    with pytest.raises(ValueError, match="layers names 9; allowed"):
        visual_attention(teacher, tiny.batch(), layers=[9])
    with pytest.raises(ValueError, match="heads is 'mix'"):
        visual_attention(teacher, tiny.batch(), heads="mix")


def test_an_unknown_family(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models
    monkeypatch.setattr(type(student.config), "model_type", "unheard_of")
    with pytest.raises(ValueError, match=r"config.model_type is 'unheard_of'; allowed: aya_vision"):
        AttentionAlignment(student, teacher)


def test_a_base_without_a_mask_function(models: tuple[Any, Any]) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    student, teacher = models
    AttentionInterface.register("maskless", sdpa_attention_forward)
    student.config.text_config._attn_implementation = "maskless"
    with pytest.raises(ValueError, match="'maskless' has no mask function of its own"):
        run(AttentionAlignment(student, teacher), tiny.batch())
    student.config.text_config._attn_implementation = "never_registered"
    with pytest.raises(ValueError, match="implementation is 'never_registered'; allowed: 'eager'"):
        run(AttentionAlignment(student, teacher), tiny.batch())


def test_a_mask_that_the_descriptors_do_not_explain(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that is described wrongly is found out at its first step."""
    student, teacher = models
    inputs = tiny.batch()
    alignment = AttentionAlignment(student, teacher)
    wrong = Family(("llava",), blocks=lambda *_: torch.zeros_like(inputs["input_ids"]))
    monkeypatch.setattr(alignment.student, "family", wrong)
    with pytest.raises(RuntimeError, match=r"student layer 1 .* differs from the model's mask"):
        run(alignment, inputs, teacher, student)


def test_a_filled_cache(models: tuple[Any, Any]) -> None:
    student, teacher = models
    alignment, inputs = AttentionAlignment(student, teacher), tiny.batch()
    inputs = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(RuntimeError, match="ran with 1 queries"):
        run(alignment, inputs, lambda input_ids, **_: teacher(input_ids=input_ids[:, -1:]))
