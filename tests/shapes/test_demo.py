"""A short run of the demo's own code path."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.shapes.demo import TEACHER, load_teacher, run
from examples.shapes.muon import Muon, orthogonalise
from examples.shapes.student import StudentSettings, draw_inputs, similarity, train_student
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.questions import TYPES

SHORT = StudentSettings(steps=3, batch_size=4, questions=6, length=100)


def test_the_demo_writes_its_table_pictures_and_numbers(tmp_path: Path) -> None:
    results = run(SHORT, tmp_path, per_type=8, teacher_folder=TEACHER)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("teacher", "student before", "student after"):
        assert set(results["accuracy"][name]["types"]) == set(TYPES)
    for name in ("lm", "kd", "alignment"):
        assert len(results["history"][name]) == SHORT.steps
        assert all(math.isfinite(v) and v >= 0 for v in results["history"][name])
    for when in ("before", "after"):
        assert -1 <= results["similarity"][when]["mean"] <= 1
    for picture in ("attention.png", "curves.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.size[0] > 500


def test_training_is_deterministic_and_leaves_teacher_and_tower_alone() -> None:
    teacher = load_teacher()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    runs = []
    for _ in range(2):
        student = build_student(3, teacher)
        runs.append((train_student(student, teacher, SHORT), student.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])
    assert all(torch.equal(kept[n], value) for n, value in teacher.state_dict().items())
    tower = "model.vision_tower."
    assert all(torch.equal(kept[n], v) for n, v in runs[0][1].items() if n.startswith(tower))


def test_alignment_alone_pulls_the_attention_together() -> None:
    teacher = load_teacher()
    student = build_student(0, teacher)
    settings = StudentSettings(steps=12, batch_size=4, questions=6, length=100, align_weight=100)
    probe = draw_inputs(settings, 10**6)
    before = similarity(student, teacher, probe)["mean"]
    train_student(student, teacher, settings)
    assert similarity(student, teacher, probe)["mean"] > before + 0.02


def test_weight_zero_is_the_control_without_alignment() -> None:
    teacher = load_teacher()
    settings = StudentSettings(steps=1, batch_size=2, questions=4, length=80, align_weight=0)
    assert train_student(build_student(0, teacher), teacher, settings).alignment == [0.0]


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_muon_orthogonalises(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.5


def test_muon_descends() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 6))
    optimizer = Muon([weight], lr=0.2, weight_decay=0.0)
    first = weight.square().sum().item()
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.square().sum().item() < 0.5 * first
