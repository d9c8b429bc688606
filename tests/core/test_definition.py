"""The definition itself: gradients in float64, its edges, and what it counts."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import AlignSpec, fused_attn_align_loss

from ..problems import every_spec, random_inputs, spec_id

BACKENDS = ("reference", "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", every_spec(sinks=(None,)), ids=spec_id)
def test_gradcheck(spec: AlignSpec, backend: str) -> None:
    """Numerical derivatives, every divergence x heads x normalize x compare, with all extras."""
    inputs = random_inputs(spec, batch=1, length=9, heads=(2, 2), key_heads=(1, 2), sizes=(3, 2))
    leaves = [inputs.q_s.requires_grad_(), inputs.k_s.requires_grad_()]
    if "mix" in inputs.keywords:
        leaves.append(inputs.keywords.pop("mix").requires_grad_())

    def loss(q: torch.Tensor, k: torch.Tensor, *mix: torch.Tensor) -> torch.Tensor:
        more = {"mix": mix[0]} if mix else {}
        return fused_attn_align_loss(
            q, k, inputs.q_t, inputs.k_t, spec=spec, backend=backend, **inputs.keywords, **more
        )

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["cosine", "kl", "mse"])
def test_joint_softmax_reaches_keys_that_are_not_visual(divergence: str, backend: str) -> None:
    """Keys outside V get -P delta. Checked alone, against -sum_h q P_h sum_V(P_h dL/dP_h)."""
    spec = AlignSpec(divergence=divergence, compare="row")
    inputs = random_inputs(spec, batch=1, extras=False)
    text = ~inputs.keywords["visual_mask"][0] & inputs.keywords["attention_mask"][0]
    _, _, dk = inputs.run(spec, backend)
    assert dk[0][:, text].abs().max() > 1e-4 * dk.abs().max()

    q, k = inputs.q_s[0], inputs.k_s[0].repeat_interleave(2, 0)
    s = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    valid = inputs.keywords["attention_mask"][0]
    causal = torch.tril(torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool))
    allowed = causal & valid & valid[:, None]
    s = torch.where(allowed.any(-1, keepdim=True), s.masked_fill(~allowed, -math.inf), 0.0)
    p = (torch.softmax(s, -1) * allowed).requires_grad_()
    q_t, k_t = inputs.q_t[0], inputs.k_t[0].repeat_interleave(2, 0)
    t = q_t @ k_t.transpose(1, 2) / math.sqrt(q_t.shape[-1])
    t = torch.where(allowed.any(-1, keepdim=True), t.masked_fill(~allowed, -math.inf), 0.0)
    visual = inputs.keywords["visual_mask"][0]
    a_s, a_t = p.mean(0)[:, visual], (torch.softmax(t, -1) * allowed).mean(0)[:, visual]
    seen = (allowed & visual).any(-1)
    a_s, a_t = a_s[seen], a_t[seen]
    if divergence == "cosine":
        units = 1 - torch.cosine_similarity(a_s, a_t, dim=-1)
    elif divergence == "kl":
        units = torch.where(a_t > 0, a_t * (a_t / a_s.clamp(min=1e-300)).log(), 0.0).sum(-1)
    else:
        units = (a_s - a_t).square().sum(-1)
    (dp,) = torch.autograd.grad(units.mean(), p)
    delta = (p * dp).sum(-1, keepdim=True)
    expected = -((p * delta).transpose(1, 2) @ q) / math.sqrt(q.shape[-1])
    expected = expected.view(2, 2, *expected.shape[1:]).sum(1)
    torch.testing.assert_close(dk[0][:, text], expected[:, text], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compare", ["map", "row", "pooled"])
def test_mean_divides_once_by_what_can_be_compared(compare: str, backend: str) -> None:
    """A batch with samples that have nothing to compare gives the loss of the others."""
    spec = AlignSpec(compare=compare)
    inputs = random_inputs(spec, batch=2, extras=False)
    alone, *gradients = inputs.run(spec, backend)
    wide = random_inputs(spec, batch=4, extras=False)
    for name in ("q_s", "k_s", "q_t", "k_t"):
        getattr(wide, name)[:2] = getattr(inputs, name)
    wide.keywords["visual_mask"][2] = False  # no image
    wide.keywords["attention_mask"][3] = False  # nothing at all
    loss, *wider = wide.run(spec, backend)
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0)
    for got, want in zip(wider, gradients, strict=True):
        torch.testing.assert_close(got[:2], want, rtol=1e-12, atol=1e-15)
        assert not got[2:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "element_mean"])
def test_no_unit_gives_exactly_zero(reduction: str, backend: str) -> None:
    spec = AlignSpec(divergence="mse", reduction=reduction)
    inputs = random_inputs(spec, extras=False)
    inputs.keywords["visual_mask"][:] = False
    for result in inputs.run(spec, backend):
        assert not result.any()
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
def test_a_confidently_wrong_student_still_learns(divergence: str, backend: str) -> None:
    """Where the student's float32 probability is exactly 0, kl and its gradient stay alive."""
    spec = AlignSpec(divergence=divergence, normalize="visual", compare="row")
    q = torch.tensor([[[[1.0]] * 3]])
    k_s = torch.tensor([[[[-200.0], [200.0], [0.0]]]])  # exp(-400) is 0 in float32
    k_t = -k_s
    q_s, k_s = q.clone().requires_grad_(), k_s.requires_grad_()
    visual = torch.tensor([[True, True, False]])
    rows = torch.tensor([[False, False, True]])
    loss = fused_attn_align_loss(
        q_s, k_s, q, k_t, visual_mask=visual, query_mask=rows, spec=spec, backend=backend
    )
    (dk,) = torch.autograd.grad(loss, k_s)
    expected = {"kl": 400.0, "reverse_kl": 400.0, "js": math.log(2)}[divergence]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(dk).all()
    if divergence == "kl":  # d/ds (log-sum-exp(s) - s_0) = (-1, 1)
        torch.testing.assert_close(dk.flatten(), torch.tensor([-1.0, 1.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_without_direction_has_cosine_zero(backend: str) -> None:
    """All the student's attention on text: the visual map underflows to 0, the loss is 1."""
    q = torch.ones(1, 1, 3, 1)
    k_s = torch.tensor([[[[-200.0], [-200.0], [200.0]]]]).requires_grad_()
    visual = torch.tensor([[True, True, False]])
    rows = torch.tensor([[False, False, True]])
    loss = fused_attn_align_loss(q, k_s, q, q, visual_mask=visual, query_mask=rows, backend=backend)
    (dk,) = torch.autograd.grad(loss, k_s)
    assert loss.item() == 1.0
    assert not dk.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_divides_the_scores_and_nothing_else(backend: str) -> None:
    cold = AlignSpec(divergence="kl", normalize="visual", temperature=2.0)
    warm = AlignSpec(divergence="kl", normalize="visual")
    inputs = random_inputs(cold, extras=False)
    loss, *_ = inputs.run(cold, backend)
    expected, *_ = inputs.run(warm, backend, scale_s=0.5 / math.sqrt(8), scale_t=0.5 / math.sqrt(5))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_queries_equal_a_query_mask(backend: str) -> None:
    """query_positions: q holds only the compared rows, in any order, with padding."""
    spec = AlignSpec(compare="row", divergence="kl", normalize="visual")
    inputs = random_inputs(spec, extras=False)
    rows = torch.tensor([[30, 20, 35, -1, 11], [15, 33, 16, 17, 18]])
    mask = torch.zeros(2, 37, dtype=torch.bool)
    for b in range(2):
        mask[b, rows[b][rows[b] >= 0]] = True
    loss, dq, dk = inputs.run(spec, backend, query_mask=mask)
    index = rows.clamp(min=0)

    def sliced(x: torch.Tensor) -> torch.Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    short = random_inputs(spec, extras=False)
    short.q_s, short.k_s, short.q_t, short.k_t = (
        *(sliced(inputs.q_s), inputs.k_s, sliced(inputs.q_t), inputs.k_t),
    )
    got, dq_rows, dk_rows = short.run(spec, backend, query_positions=rows)
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(dk_rows, dk, rtol=1e-9, atol=1e-14)
    used = (rows >= 0)[:, None, :, None]
    torch.testing.assert_close(dq_rows, sliced(dq) * used, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["joint", "visual"])
def test_given_log_sum_exps_change_nothing(normalize: str, backend: str) -> None:
    """An LSE from elsewhere is a value: same loss, same gradient."""
    spec = AlignSpec(normalize=normalize, compare="row")
    inputs = random_inputs(spec, extras=False)
    causal = torch.tril(torch.ones(37, 37, dtype=torch.bool))
    allowed = causal & inputs.keywords["attention_mask"][:, None, None, :]

    def lse(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return s.masked_fill(~allowed, -math.inf).logsumexp(-1)

    expected = inputs.run(spec, backend)
    given = {"lse_s": lse(inputs.q_s, inputs.k_s), "lse_t": lse(inputs.q_t, inputs.k_t)}
    for got, want in zip(inputs.run(spec, backend, **given), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    # and they are used: other values for some heads give another loss
    given["lse_s"] = given["lse_s"] + 0.5 * torch.arange(4.0)[:, None]
    assert (inputs.run(spec, backend, **given)[0] - expected[0]).abs() > 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_window_is_a_teacher_with_more_heads(backend: str) -> None:
    """Two teacher layers concatenated along heads: the mean of their head-mean maps."""
    spec = AlignSpec(divergence="mse", compare="row")
    inputs = random_inputs(spec, extras=False)
    other = random_inputs(spec, extras=False)
    both = torch.cat([inputs.q_t, other.q_t], 1), torch.cat([inputs.k_t, other.k_t], 1)
    inputs.q_t, inputs.k_t = both
    loss, *_ = inputs.run(spec, backend)
    reference, *_ = inputs.run(spec, "reference")
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)


def test_js_is_symmetric_and_bounded() -> None:
    spec = AlignSpec(divergence="js", normalize="visual", compare="row")
    inputs = random_inputs(
        spec, extras=False, heads=(4, 4), key_heads=(2, 2), sizes=(8, 8), scale=4
    )
    loss, *_ = inputs.run(spec, "reference")
    inputs.q_s, inputs.q_t = inputs.q_t, inputs.q_s
    inputs.k_s, inputs.k_t = inputs.k_t, inputs.k_s
    swapped, *_ = inputs.run(spec, "reference")
    torch.testing.assert_close(loss, swapped)
    assert 0 < loss.item() < math.log(2)


@pytest.mark.parametrize("divergence", ["cosine", "kl", "reverse_kl", "js", "mse"])
def test_equal_models_have_no_divergence(divergence: str) -> None:
    spec = AlignSpec(divergence=divergence, normalize="visual", compare="row")
    inputs = random_inputs(spec, extras=False)
    inputs.q_t, inputs.k_t = inputs.q_s, inputs.k_s
    for backend in BACKENDS:
        for result in inputs.run(spec, backend):
            torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-12)
