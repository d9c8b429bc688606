"""LM and logit-distillation losses against loops over positions."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.distill import lm_loss, logit_kd_loss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.full((3, 7), -100)
    labels[0, 2:5] = torch.tensor([4, 0, 10])
    labels[1, 6] = 3
    labels[2, 0] = 5  # the first token has no position that predicts it
    return student, teacher, labels


def test_lm_loss_is_the_mean_over_labelled_tokens(batch) -> None:  # type: ignore[no-untyped-def]
    student, _, labels = batch
    terms = [
        -student[b, i - 1].log_softmax(-1)[labels[b, i]]
        for b, i in [(0, 2), (0, 3), (0, 4), (1, 6)]
    ]
    assert lm_loss(student, labels).item() == pytest.approx(torch.stack(terms).mean().item(), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_is_forward_kl_at_the_positions_that_predict_answers(batch, temperature) -> None:  # type: ignore[no-untyped-def]
    student, teacher, labels = batch
    expected = []
    for b, i in [(0, 2), (0, 3), (0, 4), (1, 6)]:
        p = (teacher[b, i - 1] / temperature).softmax(-1).tolist()
        q = (student[b, i - 1] / temperature).softmax(-1).tolist()
        expected.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    loss = logit_kd_loss(student, teacher, labels, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * sum(expected) / 4, 1e-4)
    loss.backward()
    assert teacher.grad is None
    touched = student.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 5]]


def test_equal_logits_cost_nothing_and_vocabularies_are_cut(batch) -> None:  # type: ignore[no-untyped-def]
    student, _, labels = batch
    longer = torch.cat([student.detach(), torch.randn(3, 7, 5)], dim=-1)
    assert logit_kd_loss(student, longer, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert logit_kd_loss(longer, student, labels).item() == pytest.approx(0.0, abs=1e-6)


def test_a_batch_without_labels_is_zero_with_zero_gradients() -> None:
    student = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.full((2, 3), -100)
    loss = lm_loss(student, labels) + logit_kd_loss(student, torch.randn(2, 3, 5), labels)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and labels \(2, 4\)"):
        lm_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reverse_kl_and_js_written_out(batch, temperature) -> None:  # type: ignore[no-untyped-def]
    student, teacher, labels = batch
    reverse, js = [], []
    for b, i in [(0, 2), (0, 3), (0, 4), (1, 6)]:
        p = (teacher[b, i - 1] / temperature).softmax(-1).tolist()
        q = (student[b, i - 1] / temperature).softmax(-1).tolist()
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        reverse.append(sum(y * math.log(y / x) for x, y in zip(p, q, strict=True)))
        js.append(
            sum(
                x * math.log(x / z) / 2 + y * math.log(y / z) / 2
                for x, y, z in zip(p, q, m, strict=True)
            )
        )
    for name, terms in (("reverse_kl", reverse), ("js", js)):
        loss = logit_kd_loss(student, teacher, labels, divergence=name, temperature=temperature)
        assert loss.item() == pytest.approx(temperature**2 * sum(terms) / 4, 1e-10)
