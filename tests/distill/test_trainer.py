"""The trainer: normalisation over the step, logs, which parts run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


def train(
    folder: Path, losses: dict[str, Any], *, batch: int, accumulate: int, **changes: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], DistillTrainer]:
    student, teacher = worlds.pair()
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
        train_dataset=worlds.items(),
        data_collator=Collator(pad_id=0),
    )
    before = worlds.parameters(student)
    trainer.train()
    after = worlds.parameters(student)
    return {n: before[n] - after[n] for n in after}, trainer.state.log_history, trainer


@pytest.mark.parametrize("spec", ["compodistill", {"compare": "row"}, "compodistill_code"])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path: Path, spec: Any) -> None:
    losses = {**ALL, "alignment_spec": spec, "alignment_rows": "all"}
    whole, logs, _ = train(tmp_path, losses, batch=8, accumulate=1)
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    assert norm > 0.1
    for batch, accumulate in ((1, 8), (2, 4), (4, 2)):
        parts, part_logs, _ = train(tmp_path, losses, batch=batch, accumulate=accumulate)
        error = torch.stack([(parts[n] - whole[n]).norm() for n in whole]).norm() / norm
        assert error < 2e-6
        assert part_logs[0]["loss"] == pytest.approx(logs[0]["loss"], rel=2e-6)


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
