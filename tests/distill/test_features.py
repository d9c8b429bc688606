"""Hidden-state and relation losses against their formulas written out."""

from __future__ import annotations

import pytest
import torch

from fastalign.distill import hidden_sum, relation_loss


def test_hidden_distances() -> None:
    s, t = (
        torch.randn(6, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(6, 5, dtype=torch.float64),
    )
    mse = sum(((a - b) ** 2).sum() / 5 for a, b in zip(s, t, strict=True))
    cosine = sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(s, t, strict=True))
    torch.testing.assert_close(hidden_sum(s, t), mse)
    torch.testing.assert_close(hidden_sum(s, t, "cosine"), cosine)
    teacher = t.requires_grad_()
    hidden_sum(s, teacher).backward()
    assert teacher.grad is None and s.grad is not None
    with pytest.raises(ValueError, match="the same"):
        hidden_sum(s, t[:, :4])
    with pytest.raises(ValueError, match="allowed: mse, cosine"):
        hidden_sum(s, t, "l1")


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_relation_is_the_cosine_of_the_n_by_n_matrices(scale: float) -> None:
    s = (scale * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    t = torch.randn(9, 7, dtype=torch.float64)
    found = relation_loss(s, t)
    (gradient,) = torch.autograd.grad(found, s)
    a, b = (s @ s.T).flatten() / scale**2, (t @ t.T).flatten()
    plain = 1 - a @ b / (a.norm() * b.norm())
    (expected,) = torch.autograd.grad(plain, s)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12 / scale)


def test_relation_ignores_scale_and_rotation_and_survives_zeros() -> None:
    t = torch.randn(9, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert relation_loss(3 * t @ rotation, t).item() == pytest.approx(0, abs=1e-12)
    zeros = torch.zeros(9, 4, requires_grad=True)
    loss = relation_loss(zeros, t.float())
    loss.backward()
    assert loss.item() == 1 and torch.isfinite(zeros.grad).all()
    with pytest.raises(ValueError, match="number of visual tokens"):
        relation_loss(t[:3], t)
