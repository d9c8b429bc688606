"""What lies around the tensors in memory, and what a second run gives, for every kind of objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import AlignSpec, fused_attn_align_loss

from ...problems import Inputs, random_inputs, spec_id
from .common import DEVICE, inside, on_device, run

SPECS = [
    AlignSpec(compare="pooled", divergence="kl"),
    AlignSpec(heads="mix", compare="row"),
    AlignSpec(sink_sigma=0.5),
    AlignSpec(normalize="none", divergence="mse"),
    AlignSpec(heads="each", normalize="visual", divergence="js", compare="row"),
]


def _inputs(spec: AlignSpec) -> Inputs:
    shapes: dict[str, Any] = {"batch": 1, "heads": (2, 3), "key_heads": (1, 3), "length": 19}
    inputs = random_inputs(spec, dtype=torch.float32, **shapes)
    inputs.keywords["row_weight"][:, 5] = 0
    return inputs


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_identical_bits_on_a_second_run(spec: AlignSpec) -> None:
    inputs = _inputs(spec)
    for first, second in zip(run(inputs, spec), run(inputs, spec), strict=True):
        assert torch.equal(first, second)


def _surrounded(inputs: Inputs, spec: AlignSpec) -> list[Tensor]:
    """[loss, dq, dk]: every floating-point tensor lies in the middle of NaN."""
    inputs = on_device(inputs)
    keywords = {
        name: inside(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.keywords.items()
    }
    q, k = (inside(x).requires_grad_() for x in (inputs.q_s, inputs.k_s))
    q_t, k_t = (None if x is None else inside(x) for x in (inputs.q_t, inputs.k_t))
    loss = fused_attn_align_loss(q, k, q_t, k_t, spec=spec, backend="triton", **keywords)
    return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (q, k)))]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_nothing_beyond_the_tensors_is_used(spec: AlignSpec) -> None:
    """q, k, mix, weights and sinks: equal bits."""
    inputs = _inputs(spec)
    for got, want in zip(_surrounded(inputs, spec), run(inputs, spec)[:3], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("normalize", ["joint", "visual"])
def test_nothing_beyond_given_targets_and_log_sum_exps(normalize: Any) -> None:
    """A target with more rows and columns than are compared: what is beyond them is NaN, too."""
    spec = AlignSpec(compare="row", divergence="kl", normalize=normalize)
    inputs = _inputs(spec)
    for name in ("softcap_s", "softcap_t", "sink_s", "sink_t"):
        del inputs.keywords[name]
    inputs.q_t = inputs.k_t = None
    target = torch.full((1, 1, 24, 16), torch.nan)
    rows = int(inputs.keywords["attention_mask"].sum())
    columns = int(inputs.keywords["visual_mask"].sum())
    target[:, :, :rows, :columns] = torch.rand(1, 1, rows, columns)
    lse = torch.randn(1, 2, 19) + 3
    inputs.keywords.update(target=target, lse_s=lse)
    surrounded = _surrounded(inputs, spec)
    assert all(torch.isfinite(x).all() for x in surrounded)
    inputs.keywords["target"] = torch.nan_to_num(target, nan=0.7)
    for got, want in zip(surrounded, run(inputs, spec), strict=True):
        assert torch.equal(got, want)


def test_this_file_finds_what_it_looks_for() -> None:
    """A buffer that is read one row too far holds NaN."""
    x = inside(torch.ones(2, 3, device=DEVICE))
    assert torch.isnan(x.as_strided((3, 3), x.stride())[2]).all()
