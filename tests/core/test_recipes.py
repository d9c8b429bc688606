"""Every named recipe against its own formula, written independently (formulas.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastalign import RECIPES, fused_attn_align_loss

from . import formulas

B, L, H, D = 3, 29, 4, 6
BACKENDS = ("reference", "tiled")


class Batch:
    """Three samples: padded left with two images, padded right, and one without an image."""

    def __init__(self) -> None:
        def tensor(heads: int, size: int) -> Tensor:
            return torch.randn(B, heads, L, size, dtype=torch.float64)

        self.q_s, self.k_s = tensor(H, D).requires_grad_(), tensor(H, D).requires_grad_()
        self.q_t, self.k_t = tensor(H, 8), tensor(H, 8)
        self.valid = torch.ones(B, L, dtype=torch.bool)
        self.valid[0, :4] = False
        self.valid[1, -5:] = False
        self.visual = torch.zeros(B, L, dtype=torch.bool)
        self.visual[0, 6:11] = True
        self.visual[0, 14:18] = True
        self.visual[1, 2:12] = True
        self.answer = torch.zeros(B, L, dtype=torch.bool)
        self.answer[:, 19:] = True
        self.answer &= self.valid

    def maps(self, b: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        s = formulas.attention(self.q_s[b], self.k_s[b], self.valid[b], causal)
        t = formulas.attention(self.q_t[b], self.k_t[b], self.valid[b], causal)
        return s, t

    def check(self, expected: Tensor, name: str, **keywords: object) -> None:
        leaves = [self.q_s, self.k_s]
        if "mix" in keywords:
            leaves.append(keywords["mix"])  # type: ignore[arg-type]
        exact = torch.autograd.grad(expected, leaves)
        for backend in BACKENDS:
            loss = fused_attn_align_loss(
                self.q_s,
                self.k_s,
                None if "target" in keywords else self.q_t,
                None if "target" in keywords else self.k_t,
                attention_mask=self.valid,
                spec=name,
                backend=backend,
                **keywords,  # type: ignore[arg-type]
            )
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
            for got, want in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def mean(units: list[Tensor]) -> Tensor:
    return torch.stack(units).mean()


def test_compodistill() -> None:
    batch = Batch()
    units = [
        unit
        for b in (0, 1)
        for unit in formulas.compodistill(*batch.maps(b), batch.valid[b], batch.visual[b])
    ]
    batch.check(mean(units), "compodistill", visual_mask=batch.visual)


def test_compodistill_code() -> None:
    batch = Batch()
    units = [formulas.compodistill_code(*batch.maps(b), batch.visual[b])[0] for b in (0, 1)]
    batch.check(mean(units), "compodistill_code", visual_mask=batch.visual)


def test_llavadi() -> None:
    batch = Batch()
    units = [formulas.llavadi(*batch.maps(b), batch.answer[b], batch.visual[b])[0] for b in (0, 1)]
    batch.check(mean(units), "llavadi", visual_mask=batch.visual, query_mask=batch.answer)


def test_tunix() -> None:
    batch = Batch()
    units = [u for b in range(B) for u in formulas.tunix(*batch.maps(b), batch.valid[b])]
    batch.check(mean(units), "tunix")


@pytest.mark.parametrize("name", ["minilm", "linear_ard"])
def test_per_head_kl(name: str) -> None:
    batch = Batch()
    units = [
        u for b in range(B) for u in formulas.per_head_kl(*batch.maps(b), batch.valid[b], True)
    ]
    batch.check(mean(units) if name == "minilm" else torch.stack(units).sum(), name)


def test_minilm_v2_with_one_tensor_as_both_sides() -> None:
    """Q-Q relations: q is k, and the gradient is the sum of both roles."""
    batch = Batch()
    batch.k_s, batch.k_t = batch.q_s, batch.q_t
    units = [
        u
        for b in range(B)
        for u in formulas.per_head_kl(*batch.maps(b, False), batch.valid[b], False)
    ]
    expected = mean(units)
    (exact,) = torch.autograd.grad(expected, batch.q_s)
    for backend in BACKENDS:
        loss = fused_attn_align_loss(
            batch.q_s,
            batch.q_s,
            batch.q_t,
            batch.q_t,
            attention_mask=batch.valid,
            spec="minilm_v2",
            backend=backend,
        )
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        (got,) = torch.autograd.grad(loss, batch.q_s)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-10)


def test_tinybert() -> None:
    batch = Batch()
    units = [
        u
        for b in range(B)
        for u in formulas.tinybert(
            batch.q_s[b], batch.k_s[b], batch.q_t[b], batch.k_t[b], batch.valid[b]
        )
    ]
    batch.check(mean(units), "tinybert")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["klal", "lavit"])
def test_given_targets(name: str, sparse: bool) -> None:
    batch = Batch()
    rows, columns = int(batch.answer.sum(1).max()), int(batch.visual.sum(1).max())
    target = torch.rand(B, 1, rows, columns, dtype=torch.float64)
    target[:, :, :, ::3] = 0
    keywords: dict[str, Tensor] = {"target": target}
    if sparse:
        values, index = target.topk(columns, -1)
        keywords = {"target": values, "target_index": torch.where(values > 0, index, -1)}
    units = [
        u
        for b in (0, 1)
        for u in formulas.renormalised_kl(
            batch.maps(b)[0], target[b, 0], batch.answer[b], batch.visual[b]
        )
    ]
    batch.check(mean(units), name, visual_mask=batch.visual, query_mask=batch.answer, **keywords)


def test_ral() -> None:
    batch = Batch()
    weight = torch.rand(B, L, dtype=torch.float64)
    units, weights = [], []
    for b in range(B):
        u, w = formulas.ral(*batch.maps(b), batch.answer[b], batch.valid[b], weight[b])
        units, weights = units + u, weights + w
    expected = torch.stack(units).sum() / torch.stack(weights).sum()
    batch.check(expected, "ral", query_mask=batch.answer, row_weight=weight)


def test_align_kd() -> None:
    batch = Batch()
    batch.q_t, batch.k_t = batch.q_t[:, :3], batch.k_t[:, :3]
    mix = torch.randn(H, 3, dtype=torch.float64, requires_grad=True)
    units = [
        u
        for b in (0, 1)
        for u in formulas.align_kd(
            *batch.maps(b), mix, batch.valid[b] & ~batch.visual[b], batch.visual[b]
        )
    ]
    batch.check(mean(units), "align_kd", visual_mask=batch.visual, mix=mix)


def test_every_recipe_is_tested_here() -> None:
    tested = {
        *("compodistill", "compodistill_code", "llavadi", "tunix", "minilm", "minilm_v2"),
        *("linear_ard", "tinybert", "klal", "lavit", "ral", "align_kd"),
    }
    assert tested == set(RECIPES)
