"""Logit distillation from recorded distributions, against the live teacher's and written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastalign.distill import fused as fused_module
from fastalign.distill.divergences import DIVERGENCES
from fastalign.distill.fused import Recorded, fused_linear_losses
from fastalign.distill.losses import kd_sum, lm_sum, recorded_kd_sum
from fastalign.models.cache import AnswerLogits

N, V = 6, 11


def recorded(logits: Tensor, k: int, temperature: float) -> AnswerLogits:
    log_p = (logits / temperature).log_softmax(-1)
    values, tokens = log_p.topk(k, dim=-1)
    rest = (1 - values.exp().sum(-1)).clamp(min=0).log() if k < V else torch.full((N,), -math.inf)
    return AnswerLogits(tokens, values, rest)


def divergence_of(t: list[float], s: list[float], name: str) -> float:
    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    if name == "forward_kl":
        return kl(t, s)
    if name == "reverse_kl":
        return kl(s, t)
    m = [(a + b) / 2 for a, b in zip(t, s, strict=True)]
    return (kl(t, m) + kl(s, m)) / 2


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_whole_vocabulary_is_the_live_teacher_and_less_is_a_bucket(
    divergence: str, temperature: float
) -> None:
    z_s, z_t = torch.randn(N, V + 2, dtype=torch.float64), torch.randn(N, V, dtype=torch.float64)
    options = {"divergence": divergence, "temperature": temperature}
    live = kd_sum(z_s, z_t, **options)  # type: ignore[arg-type]
    found = [
        recorded_kd_sum(z_s, recorded(z_t, k, temperature), vocabulary=V, **options)  # type: ignore[arg-type]
        for k in (V, 7, 3, 1)
    ]
    assert float(found[0]) == pytest.approx(float(live), rel=1e-12)
    for larger, smaller in itertools.pairwise(found):
        assert smaller < larger
    expected = 0.0
    for s, t in zip(
        (z_s[:, :V] / temperature).softmax(-1).tolist(),
        (z_t / temperature).softmax(-1).tolist(),
        strict=True,
    ):
        top = sorted(range(V), key=lambda i: -t[i])[:3]
        pairs = [[p[i] for i in top] + [1 - sum(p[i] for i in top)] for p in (t, s)]
        expected += divergence_of(*pairs, divergence) * temperature**2
    assert float(found[2]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 4, N])
def test_fused_equals_plain(
    k: int, divergence: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_module, "tile_shape", lambda *_: (rows, 5))
    h = torch.randn(N, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V + 2, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    answers = recorded(torch.randn(N, V, dtype=torch.float64), k, 1.5)
    options = {"divergence": divergence, "temperature": 1.5}
    fused = fused_linear_losses(
        h,
        w,
        targets,
        recorded=Recorded(answers, V),
        lm_weight=0.3,
        kd_weight=1.7,
        **options,  # type: ignore[arg-type]
    )
    (3 * fused.total).backward()
    assert h.grad is not None and w.grad is not None
    found = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    lm = lm_sum(h @ w.T, targets)
    kd = recorded_kd_sum(h @ w.T, answers, vocabulary=V, **options)  # type: ignore[arg-type]
    (3 * (0.3 * lm + 1.7 * kd)).backward()
    torch.testing.assert_close((fused.lm, fused.kd), (lm.detach(), kd.detach()), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, (h.grad, w.grad), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="recorded has 6 positions; allowed: 5"):
        fused_linear_losses(h[:5], w, targets[:5], recorded=Recorded(answers, V))


def test_a_teacher_without_doubt_gives_numbers() -> None:
    """All its mass in the recorded tokens, in float32 and bfloat16: no nan, gradients included."""
    z_s = torch.randn(N, V, requires_grad=True)
    certain = torch.full((N, V), -1e4)
    certain[:, 2] = 0.0
    answers = recorded(certain, 2, 1.0)
    low = AnswerLogits(answers.tokens, answers.log_probs.bfloat16().float(), answers.rest)
    assert (answers.rest == -math.inf).all()
    for one in (answers, low):
        loss = recorded_kd_sum(z_s, one, vocabulary=V)
        (gradient,) = torch.autograd.grad(loss, z_s)
        assert loss.isfinite() and gradient.isfinite().all()
        expected = -z_s.log_softmax(-1)[:, 2].sum()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
