"""The shipped teacher: loads offline, is small, and answers from the image."""

from __future__ import annotations

import json

import pytest
import torch

from examples.shapes.card import model_card
from examples.shapes.demo import TEACHER, load_teacher
from fastalign.evals.shapes.dataset import EvaluationSet, evaluation_set
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.questions import TYPES
from fastalign.evals.shapes.render import render
from fastalign.evals.shapes.scoring import answers_right, composition_chance, evaluate
from fastalign.evals.shapes.tokenizer import IMAGE, build_tokenizer

PER_TYPE = 64


@pytest.fixture(scope="module")
def teacher():  # type: ignore[no-untyped-def]
    return load_teacher()


@pytest.fixture(scope="module")
def test_set() -> EvaluationSet:
    return evaluation_set("test", PER_TYPE, seed=1)  # other questions than those of the card


def test_it_is_far_above_chance_on_every_type(teacher, test_set) -> None:  # type: ignore[no-untyped-def]
    report = evaluate(teacher, test_set)
    claimed = json.loads((TEACHER / "scores.json").read_text())["test"]["types"]
    for type in TYPES:
        accuracy = report.types[type].accuracy
        # four standard errors of 64 answers below what the card claims
        slack = 4 * (max(claimed[type] * (1 - claimed[type]), 0.01) / PER_TYPE) ** 0.5
        assert accuracy >= claimed[type] - slack, type
    relations = [s.accuracy for k, s in report.details.items() if k.startswith("relation/")]
    assert len(relations) == 4
    assert min(relations) >= 0.7


def test_it_answers_from_the_image(teacher, test_set) -> None:  # type: ignore[no-untyped-def]
    exchanged = EvaluationSet(test_set.scenes[1:] + test_set.scenes[:1], test_set.items)
    assert evaluate(teacher, exchanged, twins=False).composition < composition_chance() + 0.2


def test_generate_gives_what_teacher_forcing_counts(teacher, test_set) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(TEACHER, local_files_only=True)
    items = test_set.items[:: len(test_set.items) // 16]
    inputs = processor(
        images=[render(test_set.scenes[item.scene]) for item in items],
        text=[IMAGE + item.question.text for item in items],
        return_tensors="pt",
        padding=True,
    )
    ids = teacher.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    right = [text == item.question.answer for text, item in zip(said, items, strict=True)]
    assert right == answers_right(teacher, test_set, items)
    assert sum(right) >= 0.7 * len(items)


def test_the_files_are_small_complete_and_agree() -> None:
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 10_000_000
    facts = json.loads((TEACHER / "scores.json").read_text())
    config = json.loads((TEACHER / "config.json").read_text())
    card = (TEACHER / "README.md").read_text()
    parameters = sum(p.numel() for p in load_teacher().parameters())
    assert card == model_card(facts, config, parameters)
    shipped = json.loads((TEACHER / "tokenizer.json").read_text())["model"]["vocab"]
    assert build_tokenizer().backend_tokenizer.get_vocab().items() >= shipped.items()


def test_the_student_shares_the_frozen_tower_and_has_other_heads(teacher) -> None:  # type: ignore[no-untyped-def]
    student = build_student(0, teacher)
    for ours, theirs in zip(
        student.model.vision_tower.parameters(),
        teacher.model.vision_tower.parameters(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
        assert ours.data_ptr() != theirs.data_ptr()
    heads = [m.config.text_config.num_attention_heads for m in (student, teacher)]
    assert heads[0] != heads[1]
    again = build_student(0, teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True)
    )
