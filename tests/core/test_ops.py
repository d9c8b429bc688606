"""The operators as torch sees them: opcheck, compile, autograd's corner cases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastalign import RECIPES, AlignSpec, fused_attn_align_loss
from fastalign.ops import _arguments
from fastalign.validate import build_problem

from ..problems import Inputs, random_inputs, spec_id

SPECS = [
    AlignSpec(),
    AlignSpec(heads="each", divergence="kl", compare="row"),
    AlignSpec(rows="visual", compare="pooled", sink_sigma=1.0),
    AlignSpec(heads="mix", divergence="mse", reduction="element_mean"),
    AlignSpec(normalize="visual", divergence="js", compare="row"),
]


def problem_of(inputs: Inputs, spec: AlignSpec) -> Any:
    names = (
        *("visual_mask", "query_mask", "attention_mask", "causal", "scale_s", "scale_t"),
        *("lse_s", "lse_t", "target", "target_index", "mix", "row_weight", "query_positions"),
        *("segment_ids", "block_ids", "window", "chunk", "softcap_s", "softcap_t"),
        *("sink_s", "sink_t"),
    )
    keywords = {**dict.fromkeys(names), **inputs.keywords}
    return build_problem(
        q_s=inputs.q_s, k_s=inputs.k_s, q_t=inputs.q_t, k_t=inputs.k_t, spec=spec, **keywords
    )


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_opcheck(spec: AlignSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(spec)
    inputs.q_s.requires_grad_()
    inputs.k_s.requires_grad_()
    arguments = (*_arguments(problem_of(inputs, spec)), "tiled")
    checks = torch.library.opcheck(torch.ops.fastalign.align.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}
    _, *saved = torch.ops.fastalign.align(*arguments)
    grad = torch.tensor(1.5, dtype=torch.float64)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    saved = [x.detach() for x in saved]
    checks = torch.library.opcheck(
        torch.ops.fastalign.align_backward.default, (*detached, grad, *saved)
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_compiles_without_a_graph_break(spec: AlignSpec) -> None:
    torch._dynamo.reset()
    inputs = random_inputs(spec, dtype=torch.float32)

    def step(q: torch.Tensor, k: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return 3 * fused_attn_align_loss(
            q * 1.5,
            k,
            inputs.q_t,
            inputs.k_t,
            spec=spec,
            backend="tiled",
            **inputs.keywords,
            **more,
        )

    more = {
        name: inputs.keywords.pop(name) for name in ("mix", "sink_s") if name in inputs.keywords
    }
    leaves = [x.requires_grad_() for x in (inputs.q_s, inputs.k_s, *more.values())]
    expected = step(inputs.q_s, inputs.k_s, **more)
    expected_grads = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(inputs.q_s, inputs.k_s, **more)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, leaves), expected_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    spec = RECIPES["compodistill"].spec
    inputs = random_inputs(spec, dtype=torch.float32, extras=False)
    q, k = inputs.q_s.requires_grad_(), inputs.k_s.requires_grad_()

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return fused_attn_align_loss(q, k, inputs.q_t, inputs.k_t, **inputs.keywords).sin()

    expected = step(q, k)
    want = torch.autograd.grad(expected, (q, k))
    loss = torch.compile(step, fullgraph=True)(q, k)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (q, k)), want)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_every_subset_of_requested_gradients(wanted: tuple[bool, ...], backend: str) -> None:
    """q_s, k_s, mix and sink_s: each gets a gradient exactly if it asks; the teacher never does."""
    spec = AlignSpec(heads="mix", divergence="mse")
    inputs = random_inputs(spec)
    full = inputs.run(spec, backend)[1:]
    mix, sink = inputs.keywords.pop("mix"), inputs.keywords.pop("sink_s")
    leaves = [
        x.detach().clone().requires_grad_(w)
        for x, w in zip((inputs.q_s, inputs.k_s, mix, sink), wanted, strict=True)
    ]
    teacher = [x.clone().requires_grad_() for x in (inputs.q_t, inputs.k_t)]
    loss = fused_attn_align_loss(
        *leaves[:2], *teacher, spec=spec, backend=backend, mix=leaves[2], sink_s=leaves[3],
        **inputs.keywords,
    )  # fmt: skip
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for leaf, asked, expected in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == asked
        if asked:
            torch.testing.assert_close(leaf.grad, expected)
    assert all(x.grad is None for x in teacher)


def test_double_backward_is_refused() -> None:
    spec = AlignSpec()
    inputs = random_inputs(spec)
    q = inputs.q_s.requires_grad_()
    loss = fused_attn_align_loss(
        q, inputs.k_s, inputs.q_t, inputs.k_t, backend="tiled", **inputs.keywords
    )
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.square().sum().backward()


def test_upstream_gradient_scales() -> None:
    spec = AlignSpec(compare="row", divergence="kl", normalize="visual")
    inputs = random_inputs(spec)
    q = inputs.q_s.requires_grad_()
    loss = fused_attn_align_loss(
        q, inputs.k_s, inputs.q_t, inputs.k_t, spec=spec, backend="tiled", **inputs.keywords
    )
    (once,) = torch.autograd.grad(loss, q, retain_graph=True)
    (scaled,) = torch.autograd.grad(-2.5 * loss, q)
    torch.testing.assert_close(scaled, -2.5 * once)


def test_inference_and_no_grad_run() -> None:
    spec = AlignSpec()
    inputs = random_inputs(spec)
    expected, *_ = inputs.run(spec, "tiled")
    q = inputs.q_s.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = fused_attn_align_loss(
                q, inputs.k_s, inputs.q_t, inputs.k_t, backend="tiled", **inputs.keywords
            )
        assert not loss.requires_grad
        torch.testing.assert_close(loss.clone(), expected)
