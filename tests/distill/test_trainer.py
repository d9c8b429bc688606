"""The trainer: normalisation over the step, logs, which parts run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fastalign.distill.config import DistillConfig
from fastalign.distill.data.collate import Collator
from fastalign.distill.trainer import DistillTrainer

from . import worlds

ALL = {
    "lm": 0.7,
    "kd": 1.3,
    "visual_kd": 0.2,
    "alignment": 2.0,
    "hidden": 0.5,
    "relation": 0.4,
}


class Gradients(TrainerCallback):
    """The gradients that the optimiser is about to use.

    Not the step that it takes: a parameter minus its update is rounded to the parameter's size, which
    hides a gradient's last digits (that alone is 2e-6 of these).
    """

    found: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **keywords: Any) -> None:
        self.found = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def train(
    folder: Path,
    losses: dict[str, Any],
    *,
    batch: int,
    accumulate: int,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], DistillTrainer]:
    """One optimiser step: (gradients, logs, trainer)."""
    student, teacher = (model.to(dtype) for model in worlds.pair())
    items = worlds.items()
    for item in items:
        if "pixel_values" in item:
            item["pixel_values"] = item["pixel_values"].to(dtype)
    gradients = Gradients()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "losses": losses,
        "disable_tqdm": True,
        **changes,
    }
    torch.manual_seed(0)
    trainer = DistillTrainer(
        student,
        DistillConfig(**arguments),
        teacher,
        train_dataset=items,
        data_collator=Collator(pad_id=0),
        callbacks=[gradients],
    )
    trainer.train()
    return gradients.found, trainer.state.log_history, trainer


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative, in the 2-norm over all parameters (some have no gradient but rounding).

    A parameter that nothing reached has no gradient, or zero where a micro-batch without images
    kept it in the graph.
    """
    names = found.keys() | expected.keys()
    like = {**found, **expected}
    ours, theirs = (
        [g.get(n, torch.zeros_like(like[n])).double() for n in names] for g in (found, expected)
    )
    whole = torch.stack([g.norm() for g in theirs]).norm()
    assert whole > 0.01
    return float(
        torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm() / whole
    )


@pytest.mark.parametrize(
    ("spec", "rounding"),
    [
        ("compodistill", 1e-6),
        ({"compare": "row"}, 1e-6),
        ("compodistill_code", 2e-6),  # its largest is 1.03e-6, 8 x 1
    ],
    ids=["compodistill", "row", "compodistill_code"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_step_does_not_depend_on_how_it_is_cut(
    tmp_path: Path, spec: Any, rounding: float, dtype: torch.dtype
) -> None:
    """8 at once, 4 x 2, 2 x 4 and 8 x 1: one loss and one gradient, all terms together."""
    tolerance = 1e-13 if dtype == torch.float64 else rounding
    losses = {**ALL, "alignment_spec": spec, "alignment_rows": "all"}
    whole, logs, _ = train(tmp_path, losses, batch=8, accumulate=1, dtype=dtype)
    for batch, accumulate in ((1, 8), (2, 4), (4, 2)):
        cut = {"batch": batch, "accumulate": accumulate, "dtype": dtype}
        parts, part_logs, _ = train(tmp_path, losses, **cut)
        assert difference(parts, whole) < tolerance
        for name in ("loss", *(f"loss/{term}" for term in ALL)):
            close = (
                1e-6 if name == "loss" else 5e-6
            )  # single terms are small differences in float32
            assert part_logs[0][name] == pytest.approx(logs[0][name], rel=close)


@pytest.mark.parametrize("term", ALL)
def test_each_term_alone_does_not_depend_on_how_a_step_is_cut(tmp_path: Path, term: str) -> None:
    losses = {"lm": 0.0, term: 1.0, "alignment_rows": "all"}
    whole, _, _ = train(tmp_path, losses, batch=8, accumulate=1, dtype=torch.float64)
    parts, _, _ = train(tmp_path, losses, batch=2, accumulate=4, dtype=torch.float64)
    assert difference(parts, whole) < 1e-13


def test_the_total_is_the_weighted_sum_of_the_logged_terms(tmp_path: Path) -> None:
    _, logs, _ = train(tmp_path, ALL, batch=4, accumulate=2)
    terms = {name: logs[0][f"loss/{name}"] for name in ALL}
    assert all(value > 0 for value in terms.values())
    assert logs[0]["loss"] == pytest.approx(sum(ALL[n] * terms[n] for n in ALL), rel=1e-5)


@pytest.mark.parametrize("option", [{"fused_head": False}, {"activation_checkpointing": True}])
def test_options_change_nothing(tmp_path: Path, option: dict[str, Any]) -> None:
    losses = {**ALL, "hidden": 0.0}
    plain, logs, _ = train(tmp_path, losses, batch=4, accumulate=2)
    other, other_logs, _ = train(tmp_path, losses, batch=4, accumulate=2, **option)
    assert other_logs[0]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=2e-6)


def test_the_teacher_gets_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    _, _, trainer = train(tmp_path, {"lm": 1, "kd": 1}, batch=4, accumulate=2)
    assert trainer.teacher is not None and not trainer.teacher.training
    assert all(p.grad is None for p in trainer.teacher.parameters())
    with pytest.raises(ValueError, match=r"\['kd'\] need one"):
        DistillTrainer(
            worlds.pair()[0],
            DistillConfig(output_dir=str(tmp_path), losses={"kd": 1}, use_cpu=True),
            None,
        )


def test_a_shared_tower_runs_once_and_changes_nothing(tmp_path: Path) -> None:
    runs = {}
    for share in ("auto", "never"):
        student, teacher = worlds.pair()
        student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
        student.model.vision_tower.requires_grad_(False)
        calls = []
        student.model.vision_tower.encoder.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        trainer = DistillTrainer(
            student,
            DistillConfig(
                output_dir=str(tmp_path),
                losses={"lm": 1, "alignment": 1},
                use_cpu=True,
                share_vision=share,
            ),
            teacher,
        )
        assert trainer.objective.shares_vision == (share == "auto")
        batch = Collator(pad_id=0)(worlds.items())
        total, _ = trainer.objective(student, batch, trainer.objective.count(batch))
        total.backward()
        grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        runs[share] = (total.detach(), grads, len(calls))
    assert (runs["auto"][2], runs["never"][2]) == (0, 1)
    torch.testing.assert_close(runs["auto"][0], runs["never"][0])
    torch.testing.assert_close(runs["auto"][1], runs["never"][1])
