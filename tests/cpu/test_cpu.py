"""The C++ kernels against the definition: every spec, every precision, any cut of the work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fastalign import AlignSpec, fused_attn_align_loss
from fastalign.backends import cpu

from ..problems import Inputs, every_spec, random_inputs, relative_error, spec_id
from ..strategies import calls
from ..streaming import check_any_call, check_precision

#: Workspaces: everything at once; a few blocks a chunk; one block, some heads; one block, one head.
BUDGETS = (cpu.WORKSPACE_BYTES, 120_000, 20_000, 1_000)


@pytest.fixture(autouse=True)
def poisoned_workspace() -> Iterator[None]:
    """NaN in every buffer of the kernels before it is written."""
    library = cpu.load_library()
    library.fa_poison(1)
    yield
    library.fa_poison(0)


@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_equals_the_definition_in_float64(spec: AlignSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients to 1e-10, with masks, weights, caps and sinks and without, at any workspace."""
    for extras in (True, False):
        inputs = random_inputs(spec, extras=extras)
        exact = inputs.run(spec, "reference")
        for budget in BUDGETS:
            monkeypatch.setattr(cpu, "WORKSPACE_BYTES", budget)
            for got, want in zip(inputs.run(spec, "cpu"), exact, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", every_spec(sinks=(None,)), ids=spec_id)
def test_error_is_within_twice_torchs_own(spec: AlignSpec, dtype: torch.dtype) -> None:
    check_precision("cpu", spec, dtype)


@settings(max_examples=1000)
@given(call=calls())
def test_any_call_is_finite_and_right(call: tuple[AlignSpec, Inputs]) -> None:
    """Shapes 1-70, B 0-3, GQA, unequal sides, any mask, logits to 1e4: no NaN, no warning."""
    check_any_call("cpu", *call)


@pytest.mark.parametrize("length", [1, 63, 111, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_odd_lengths(length: int, dtype: torch.dtype) -> None:
    """Tails of every tile: one key, one row, no multiple of anything."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    visual = torch.rand((1, length), generator=generator) < 0.6
    inputs = Inputs(
        normal(1, 4, length, 33), normal(1, 2, length, 33), normal(1, 3, length, 7),
        normal(1, 1, length, 7), {"visual_mask": visual, "causal": length != 111},
    )  # fmt: skip
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    exact = inputs.to(torch.float64).run("compodistill", "reference")
    for got, want in zip(inputs.run("compodistill", "cpu"), exact, strict=True):
        assert relative_error(got, want) < tolerance or (got - want).abs().max() < tolerance


SOME = [
    AlignSpec(),
    AlignSpec(heads="each", divergence="kl", compare="row"),
    AlignSpec(rows="visual", compare="pooled", sink_sigma=1.0),
    AlignSpec(heads="mix", divergence="mse", reduction="element_mean"),
    AlignSpec(normalize="visual", divergence="js", compare="row"),
]


@pytest.mark.parametrize("budget", BUDGETS[:2])
@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_bits_do_not_depend_on_the_number_of_threads(
    spec: AlignSpec, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 to 8 threads, and twice the same number: not one bit differs."""
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", budget)
    inputs = random_inputs(spec, length=150, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            results.append(inputs.run(spec, "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_graph_that_is_kept_keeps_its_gradients(dtype: torch.dtype) -> None:
    """Only the last backward may scale them where they lie; each gives the same, by its own factor."""
    inputs = random_inputs(AlignSpec(), dtype=dtype)
    q, k = (x.detach().clone().requires_grad_() for x in (inputs.q_s, inputs.k_s))
    loss = fused_attn_align_loss(q, k, inputs.q_t, inputs.k_t, backend="cpu", **inputs.keywords)
    once = torch.autograd.grad(loss, (q, k), retain_graph=True)
    kept = [x.clone() for x in once]
    twice = torch.autograd.grad(2 * loss, (q, k), retain_graph=True)
    last = torch.autograd.grad(4 * loss, (q, k))
    for first, before, second, third in zip(once, kept, twice, last, strict=True):
        assert torch.equal(first, before) and first.abs().max() > 0
        assert torch.equal(second, 2 * first) and torch.equal(third, 4 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_few_rows_and_many_keys(
    budget: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads share the heads of a block, of all key heads in every pass; and the bits are the same."""
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", budget)
    generator = torch.Generator().manual_seed(6)
    length, rows = 9000, 20

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    visual = torch.rand((1, length), generator=generator) < 0.8
    inputs = Inputs(
        normal(1, 6, rows, 8), normal(1, 2, length, 8), normal(1, 5, rows, 8),
        normal(1, 5, length, 8),
        {"visual_mask": visual, "query_positions": torch.arange(length - rows, length)[None]},
    )  # fmt: skip
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(inputs.run(AlignSpec(), "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)
    exact = inputs.to(torch.float64).run(AlignSpec(), "reference")
    for got, want in zip(results[0], exact, strict=True):
        assert relative_error(got, want) < (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_every_subset_of_requested_gradients(spec: AlignSpec) -> None:
    """What is asked for is what comes when everything is asked for; what is not stays None."""
    inputs = random_inputs(spec, dtype=torch.float64)
    leaves = {"q_s": inputs.q_s, "k_s": inputs.k_s}
    for name in ("mix", "sink_s"):
        if name in inputs.keywords:
            leaves[name] = inputs.keywords.pop(name)

    def gradients(names: tuple[str, ...]) -> dict[str, torch.Tensor | None]:
        own = {name: x.detach().clone().requires_grad_(name in names) for name, x in leaves.items()}
        loss = fused_attn_align_loss(
            q_t=inputs.q_t, k_t=inputs.k_t, spec=spec, backend="cpu", **own, **inputs.keywords
        )  # fmt: skip
        if names:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            assert not loss.requires_grad
        return {name: x.grad for name, x in own.items()}

    everything = gradients(tuple(leaves))
    for size in range(len(leaves) + 1):
        for names in itertools.combinations(leaves, size):
            for name, grad in gradients(names).items():
                if name in names:
                    assert grad is not None
                    torch.testing.assert_close(grad, everything[name], rtol=1e-12, atol=1e-14)
                else:
                    assert grad is None


@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_the_upstream_gradient_and_the_recomputing_backward(spec: AlignSpec) -> None:
    """A scaled loss, and the operator without kept gradients (what a backend without them runs)."""
    inputs = random_inputs(spec, dtype=torch.float64)
    kept = inputs.run(spec, "cpu")[1:]
    q, k = inputs.q_s.clone().requires_grad_(), inputs.k_s.clone().requires_grad_()
    loss = fused_attn_align_loss(
        q, k, inputs.q_t, inputs.k_t, spec=spec, backend="cpu", **inputs.keywords
    )
    (-2.5 * loss).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(q.grad, -2.5 * kept[0])
    torch.testing.assert_close(k.grad, -2.5 * kept[1])
    problem = problem_of(inputs, spec)
    saved = cpu.forward(problem)
    torch.testing.assert_close(saved.loss, loss.detach())
    grad = torch.tensor(3.0, dtype=torch.float64)
    gradients = [x for x in cpu.backward(problem, saved, grad) if x.numel()]
    for got, want in zip(gradients, kept, strict=True):
        torch.testing.assert_close(got, 3 * want)


def problem_of(inputs: Inputs, spec: AlignSpec) -> Any:
    from ..core.test_ops import problem_of as build

    return build(inputs, spec)


@pytest.mark.parametrize("spec", SOME[:2] + SOME[4:], ids=spec_id)
def test_a_given_log_sum_exp_changes_nothing(spec: AlignSpec) -> None:
    """The loss and the gradients with the log-sum-exps of the forward handed back in."""
    inputs = random_inputs(spec, extras=False)
    problem = problem_of(inputs, spec)
    exact = inputs.run(spec, "reference")
    out = cpu.forward(problem)
    for lse in (
        {"lse_s": out.lse_s},
        {"lse_t": out.lse_t},
        {"lse_s": out.lse_s, "lse_t": out.lse_t},
    ):
        for got, want in zip(inputs.run(spec, "cpu", **lse), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        no_grad = fused_attn_align_loss(
            inputs.q_s, inputs.k_s, inputs.q_t, inputs.k_t, spec=spec, backend="cpu",
            **inputs.keywords, **lse,
        )  # fmt: skip
        torch.testing.assert_close(no_grad, exact[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        AlignSpec(normalize="visual", compare="row", divergence="kl"),
        AlignSpec(normalize="visual", compare="row", divergence="reverse_kl"),
        AlignSpec(sink_sigma=0.5),
        AlignSpec(heads="each", divergence="js", sink_sigma=0.5),
        AlignSpec(compare="pooled"),
        AlignSpec(heads="mix", divergence="mse"),
        AlignSpec(normalize="none", divergence="mse", compare="row"),
    ],
    ids=spec_id,
)
def test_given_targets(spec: AlignSpec, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and sparse maps in the teacher's place, with exact zeros in them."""
    inputs = random_inputs(spec)
    groups = {"mean": 1, "each": 4, "mix": 6}[spec.heads]
    rows, columns = 37, int(inputs.keywords["visual_mask"].sum(-1).max())
    width = 5 if sparse else columns
    shape = (2, groups, width) if spec.compare == "pooled" else (2, groups, rows, width)
    target = torch.rand(shape, dtype=torch.float64)
    target = target * (target > 0.2)
    index = torch.randint(-1, columns, shape) if sparse else None
    given = Inputs(inputs.q_s, inputs.k_s, None, None, dict(inputs.keywords))
    for name in ("softcap_t", "sink_t"):
        given.keywords.pop(name, None)
    given.keywords.update(target=target, target_index=index)
    exact = given.run(spec, "reference")
    for budget in BUDGETS:
        monkeypatch.setattr(cpu, "WORKSPACE_BYTES", budget)
        for got, want in zip(given.run(spec, "cpu"), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_any_strides() -> None:
    """Transposed, sliced, expanded and reversed-by-flip storage gives the bits of contiguous storage."""
    inputs = random_inputs(AlignSpec(), dtype=torch.float32)
    want = inputs.run("compodistill", "cpu")

    def views(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield x.transpose(1, 2).contiguous().transpose(1, 2)
        yield torch.stack([x, x], -1)[..., 0]
        yield torch.cat([x, x], 2)[:, :, : x.shape[2]]
        yield x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    for q, k in zip(views(inputs.q_s), views(inputs.k_s), strict=True):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        assert not q.is_contiguous()
        loss = fused_attn_align_loss(q, k, inputs.q_t, inputs.k_t, backend="cpu", **inputs.keywords)
        got = [loss.detach(), *torch.autograd.grad(loss, [q, k])]
        assert all(torch.equal(a, b) for a, b in zip(got, want[:3], strict=True))


def test_a_second_derivative_is_refused() -> None:
    inputs = random_inputs(AlignSpec())
    q = inputs.q_s.requires_grad_()
    loss = fused_attn_align_loss(
        q, inputs.k_s, inputs.q_t, inputs.k_t, backend="cpu", **inputs.keywords
    )
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_compiles_without_a_graph_break(spec: AlignSpec) -> None:
    torch._dynamo.reset()
    inputs = random_inputs(spec, dtype=torch.float32)
    more = {
        name: inputs.keywords.pop(name) for name in ("mix", "sink_s") if name in inputs.keywords
    }
    leaves = [x.requires_grad_() for x in (inputs.q_s, inputs.k_s, *more.values())]

    def step(q: torch.Tensor, k: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return 3 * fused_attn_align_loss(
            q * 1.5, k, inputs.q_t, inputs.k_t, spec=spec, backend="cpu", **inputs.keywords, **more
        )

    expected = step(inputs.q_s, inputs.k_s, **more)
    expected_grads = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(inputs.q_s, inputs.k_s, **more)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, leaves), expected_grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_opcheck(spec: AlignSpec) -> None:
    from fastalign.ops import _arguments

    inputs = random_inputs(spec)
    inputs.q_s.requires_grad_()
    inputs.k_s.requires_grad_()
    wanted = 3 + 4 * ("mix" in inputs.keywords) + 8 * ("sink_s" in inputs.keywords)
    arguments = (*_arguments(problem_of(inputs, spec)), "cpu", wanted)
    checks = torch.library.opcheck(torch.ops.fastalign.align_with_gradients.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("length", range(15, 31))
def test_bfloat16_gradient_of_every_key_and_row(length: int) -> None:
    """Each key's dk and each row's dq on its own, at every remainder of a tile's 14 keys and 16 rows."""
    torch.manual_seed(length)
    q_s, q_t = (torch.randn(1, 2, length, 32).bfloat16() for _ in range(2))
    k_s, k_t = (torch.randn(1, 2, length, 32).bfloat16() for _ in range(2))
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, 2 : length - 1] = True

    def gradients(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k = (x.to(dtype).requires_grad_() for x in (q_s.clone(), k_s.clone()))
        loss = fused_attn_align_loss(
            q, k, q_t.to(dtype), k_t.to(dtype), visual_mask=visual,
            query_mask=torch.ones_like(visual), spec=AlignSpec(), backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(loss, (q, k))

    exact = gradients("reference", torch.float64)
    for got, want in zip(gradients("cpu", torch.bfloat16), exact, strict=True):
        error = (got.double() - want).norm(dim=-1)
        assert (error <= 0.02 * want.norm(dim=-1) + 0.002 * want.norm(dim=-1).max()).all()


def test_mix_over_chunks_of_groups_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal rows whose first chunk holds all groups and a later, wider one does not: dq adds up."""
    torch.manual_seed(0)
    sizes = ((1, 2, 111, 64), (1, 2, 111, 64), (1, 3, 111, 64), (1, 3, 111, 64), (2, 3))
    q, k, q_t, k_t, mix = (torch.randn(size, dtype=torch.float64) for size in sizes)
    visual = torch.zeros(1, 111, dtype=torch.bool)
    visual[:, 5:90] = True

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, mix)]
        loss = fused_attn_align_loss(
            leaves[0], leaves[1], q_t, k_t, visual_mask=visual, query_mask=torch.ones_like(visual),
            mix=leaves[2], spec=AlignSpec(heads="mix"), backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    exact = gradients("reference")
    for budget in (20_000, 40_000, 80_000, 160_000):
        monkeypatch.setattr(cpu, "WORKSPACE_BYTES", budget)
        for got, want in zip(gradients("cpu"), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
