"""Log-sum-exps that attention kernels hand over, in place of a sweep of our own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign import AlignSpec
from fastalign.lse import KERNELS, add_sink, attend, dense, packed, sdpa_lse

from ..problems import Inputs, relative_error

LENGTH = 37
ROW_SPEC = AlignSpec(compare="row", divergence="kl", normalize="visual")
SPECS = [AlignSpec(), ROW_SPEC]

# FlexAttention compiles a wrapper, and says once that its eager form is slow
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def _sides(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q and k of a student with 4 heads over 2 key heads, and of a teacher with 6 over 3."""
    shapes = ((4, 16), (2, 16), (6, 24), (3, 24))
    return [torch.randn(2, heads, LENGTH, size).to(dtype) for heads, size in shapes]


def _own(q: Tensor, k: Tensor, see: Tensor, scale: float, cap: float = 0.0) -> Tensor:
    """[B, H, L] in float64, from the definition; ``see`` [B or 1, L, L] bool."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * q.double() @ k.transpose(-1, -2)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return scores.masked_fill(~see.unsqueeze(1), -math.inf).logsumexp(-1)


def _see(causal: bool, window: int | None = None, valid: Tensor | None = None) -> Tensor:
    place = torch.arange(LENGTH)
    gap = place[:, None] - place
    see = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
    if window:
        see = see & (gap.abs() < window)
    return see[None] if valid is None else see & valid[:, None, :]


def _compare(inputs: Inputs, spec: AlignSpec, backend: str, slack: float, **lse: Tensor) -> None:
    """Loss and gradients with given log-sum-exps equal those with our own sweep."""
    own = inputs.run(spec, backend)
    given = inputs.run(spec, backend, **lse)
    for got, want in zip(given, own, strict=True):
        assert relative_error(got, want) <= slack
    wrong = {name: value + 0.3 * torch.randn_like(value) for name, value in lse.items()}
    assert relative_error(inputs.run(spec, backend, **wrong)[1], own[1]) > 100 * slack


def _visual() -> Tensor:
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 3:20], mask[1, 9:30] = True, True
    return mask


# --------------------------------------------------------------- kernels that run on a CPU


@pytest.mark.parametrize("backend", ["tiled", "cpu"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kernel", ["sdpa_flash", "flex"])
def test_loss_and_gradients_with_the_kernel_s_own(kernel: str, causal: bool, backend: str) -> None:
    q_s, k_s, q_t, k_t = _sides()
    with torch.no_grad():
        lse_s = attend(q_s, k_s, k_s, kernel=kernel, causal=causal)[1]
        lse_t = attend(q_t, k_t, k_t, kernel=kernel, causal=causal)[1]
    inputs = Inputs(q_s, k_s, q_t, k_t, {"visual_mask": _visual(), "causal": causal})
    for spec in SPECS:
        _compare(inputs, spec, backend, 2e-5, lse_s=lse_s, lse_t=lse_t)


# In half precision the log-sum-exp of aten's flash kernel for CPUs is off by 6e-5
@pytest.mark.parametrize(
    ("kernel", "slack"), [("sdpa_flash", 2e-4), ("flex", 1e-5)], ids=["sdpa", "flex"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kernel: str, slack: float, dtype: torch.dtype) -> None:
    q_s, k_s, q_t, k_t = _sides(dtype)
    lse = {}
    for name, q, k in (("lse_s", q_s, k_s), ("lse_t", q_t, k_t)):
        with torch.no_grad():
            lse[name] = attend(q, k, k, kernel=kernel)[1]
        assert lse[name].dtype == torch.float32
        exact = _own(q, k, _see(True), q.shape[-1] ** -0.5)
        torch.testing.assert_close(lse[name].double(), exact, atol=slack / 2, rtol=0)
    inputs = Inputs(q_s, k_s, q_t, k_t, {"visual_mask": _visual()})
    own, given = inputs.run(ROW_SPEC, "tiled"), inputs.run(ROW_SPEC, "tiled", **lse)
    rounding = torch.finfo(dtype).eps
    for got, want in zip(given, own, strict=True):
        assert relative_error(got, want) <= slack + rounding


def test_flex_with_window_softcap_padding_and_scale() -> None:
    q, k = _sides()[:2]
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :5], valid[1, -7:] = False, False
    keywords: dict[str, Any] = {"attention_mask": valid, "window": 6, "softcap": 2.0, "scale": 0.4}
    with torch.no_grad():
        out, lse = attend(q, k, k, kernel="flex", **keywords)
    exact = _own(q, k, _see(True, 6, valid), 0.4, 2.0)
    assert out.shape == q.shape
    here = valid[:, None].expand_as(lse)
    torch.testing.assert_close(lse[here].double(), exact[here], atol=1e-5, rtol=0)
    inputs = Inputs(
        q, k, q, k * 0.5, {"visual_mask": _visual(), "attention_mask": valid, "window": 6}
    )
    inputs.keywords.update(softcap_s=2.0, softcap_t=2.0, scale_s=0.4)
    _compare(inputs, ROW_SPEC, "tiled", 2e-5, lse_s=lse)


def test_float64() -> None:
    q, k = _sides(torch.float64)[:2]
    lse = attend(q, k, k, kernel="sdpa_flash")[1]
    torch.testing.assert_close(lse, _own(q, k, _see(True), 0.25), atol=1e-12, rtol=0)


def test_output_and_its_gradient_are_the_kernel_s() -> None:
    q, k = _sides()[:2]
    q.requires_grad_()
    out, lse = attend(q, k, k, kernel="sdpa_flash")
    want = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert torch.equal(out, want)
    assert not lse.requires_grad
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_sdpa_lse_catches_every_call_and_what_has_none(mode: Callable[[], Any]) -> None:
    q, k = _sides()[:2]
    k = k.repeat_interleave(2, 1)
    with mode(), sdpa_lse() as caught:
        for window in (None, 4):
            mask = None if window is None else _see(True, window).expand(2, 1, -1, -1)
            F.scaled_dot_product_attention(q, k, k, mask, is_causal=window is None)
            found, exact = dense(caught.lse, q), _own(q, k, _see(True, window), 0.25)
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
        first = caught.lse
        q + 1  # anything else leaves it alone
        assert caught.lse is first
        F.scaled_dot_product_attention(q, k, k, dropout_p=0.5)  # plain torch, no fused kernel
        assert caught.lse is None
        F.scaled_dot_product_attention(q, k, k)
        first = caught.lse
        assert first is not None
    F.scaled_dot_product_attention(q, k, k, is_causal=True)  # what comes after is not looked at
    assert caught.lse is first


# ------------------------------------------------------- stand-ins of the same signatures


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, see: Tensor, cap: float, no_row: float
) -> tuple[Tensor, Tensor]:
    """[B, L, H, D] in, ([B, L, H, D], [B, H, L]) out; ``no_row`` is what a row without keys gets."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~see, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num()
    return (weights @ v).transpose(1, 2), lse.masked_fill(lse == -math.inf, no_row)


def _library_mask(
    rows: int, causal: bool, window: tuple[int | None, int | None], unlimited: int | None
) -> Tensor:
    """As the libraries say it: [i - left, i + right] inclusive, and nothing later if causal."""
    gap = torch.arange(rows)[:, None] - torch.arange(rows)
    left, right = (rows if x == unlimited else x for x in window)
    assert left is not None
    assert right is not None
    see = (gap <= left) & (-gap <= right)
    return see & (gap >= 0) if causal else see


def _by_sample(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, **more: Any
) -> tuple[Tensor, Tensor]:
    """Packed [total, H, D] in, ([total, H, D], [H, total]) out."""
    assert starts.dtype == torch.int32
    outs, lses = [], []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - begin <= longest
        window, unlimited, causal = (more[name] for name in ("window", "unlimited", "causal"))
        see = _library_mask(end - begin, causal, window, unlimited)
        parts = (x[begin:end].unsqueeze(0) for x in (q, k, v))
        out, lse = _attention(*parts, more["scale"], see, more["cap"], more["no_row"])
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def _flash_attn_2() -> ModuleType:
    """flash_attn 2.8: names, order and defaults of its interface; +inf where a row sees nothing."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        see = _library_mask(q.shape[1], causal, window_size, -1)
        out, lse = _attention(q, k, v, softmax_scale, see, softcap, math.inf)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        out, lse = _by_sample(
            q, k, v, cu_seqlens_q, max_seqlen_q, scale=softmax_scale, causal=causal,
            window=window_size, unlimited=-1, cap=softcap, no_row=math.inf,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out

    return _module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def _flash_attn_3() -> ModuleType:
    """flash_attn 3 (hopper/flash_attn_interface.py)."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        see = _library_mask(q.shape[1], causal, window_size, -1)
        result = _attention(q, k, v, softmax_scale, see, softcap, -math.inf)
        return result if return_attn_probs else result[0]

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        result = _by_sample(
            q, k, v, cu_seqlens_q, max_seqlen_q, scale=softmax_scale, causal=causal,
            window=window_size, unlimited=-1, cap=softcap, no_row=-math.inf,
        )  # fmt: skip
        return result if return_attn_probs else result[0]

    return _module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def _flash_attn_4() -> ModuleType:
    """flash_attn 4 (flash_attn/cute/interface.py): None for no window; always two results."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None,
        return_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        see = _library_mask(q.shape[1], causal, window_size, None)
        out, lse = _attention(q, k, v, softmax_scale, see, softcap, -math.inf)
        return out, (lse if return_lse else None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, return_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        out, lse = _by_sample(
            q, k, v, cu_seqlens_q, max_seqlen_q, scale=softmax_scale, causal=causal,
            window=window_size, unlimited=None, cap=softcap, no_row=-math.inf,
        )  # fmt: skip
        return out, (lse if return_lse else None)

    return _module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def _module(name: str, *functions: Callable[..., Any]) -> ModuleType:
    module = ModuleType(name)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


FLASH = {
    "flash_attn_2": _flash_attn_2,
    "flash_attn_3": _flash_attn_3,
    "flash_attn_4": _flash_attn_4,
}


def _install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    parent = module.__name__.partition(".")[0]
    if parent != module.__name__:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize(
    "more",
    [{}, {"causal": False, "window": 9}, {"window": 6, "softcap": 2.0, "scale": 0.4}],
    ids=str,
)
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attn(
    kernel: str, more: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our arguments, put into each library's, mean the same: the log-sum-exp is the definition's."""
    _install(monkeypatch, FLASH[kernel]())
    q, k = _sides()[:2]
    valid = None
    if padded:
        valid = torch.ones(2, LENGTH, dtype=torch.bool)
        valid[0, :5], valid[1, -7:] = False, False
    out, lse = attend(q, k, k, kernel=kernel, attention_mask=valid, **more)
    causal, window = more.get("causal", True), more.get("window")
    cap, scale = more.get("softcap", 0.0), more.get("scale", 0.25)
    exact = _own(q, k, _see(causal, window, valid), scale, cap)
    here = torch.ones_like(lse, dtype=torch.bool)
    if valid is not None:
        here = valid[:, None].expand_as(lse)
        assert (lse[~here] == -math.inf).all()
    torch.testing.assert_close(lse[here].double(), exact[here], atol=1e-5, rtol=0)
    assert out.shape == q.shape
    b, h, i = 1, 3, 20
    scores = scale * q[b, h, i].double() @ k[b, 1].double().T
    scores = cap * torch.tanh(scores / cap) if cap else scores
    weights = (scores - exact[b, h, i]).exp() * _see(causal, window, valid).expand(2, -1, -1)[b, i]
    torch.testing.assert_close(out[b, h, i].double(), weights @ k[b, 1].double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attn_end_to_end(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, FLASH[kernel]())
    q_s, k_s, q_t, k_t = _sides()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :5] = False
    lse_s = attend(q_s, k_s, k_s, kernel=kernel, attention_mask=valid)[1]
    lse_t = attend(q_t, k_t, k_t, kernel=kernel, attention_mask=valid)[1]
    inputs = Inputs(q_s, k_s, q_t, k_t, {"visual_mask": _visual(), "attention_mask": valid})
    _compare(inputs, ROW_SPEC, "tiled", 2e-5, lse_s=lse_s, lse_t=lse_t)


@contextmanager
def _on_cpu(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """An aten operator without a CPU kernel gets one."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def test_sdpa_efficient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows padded to 64, +inf in the rest; nothing where no backward can follow, as aten does it."""

    def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
        parts = (x.transpose(1, 2) for x in (query, key, value))
        see = _library_mask(query.shape[2], is_causal, (-1, -1), -1)
        out, lse = _attention(*parts, scale, see, 0.0, -math.inf)
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
        nothing = lse.new_zeros((*lse.shape[:2], 0))
        return (
            out.transpose(1, 2),
            lse if compute_log_sumexp else nothing,
            *torch.zeros(2, dtype=int),
        )

    def scaled_dot_product_attention(q, k, v, is_causal, scale, enable_gqa):  # type: ignore[no-untyped-def]
        assert not enable_gqa
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        with torch.no_grad():
            return op(q, k, v, None, wanted, 0.0, is_causal, scale=scale)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    q, k = _sides()[:2]
    with _on_cpu("_scaled_dot_product_efficient_attention", efficient):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                out, lse = attend(q, k, k, kernel="sdpa_efficient", scale=0.4)
            assert not out.requires_grad
            assert lse.shape == (2, 4, LENGTH)
            torch.testing.assert_close(lse.double(), _own(q, k, _see(True), 0.4), atol=1e-5, rtol=0)
        with sdpa_lse() as caught:
            scaled_dot_product_attention(q, k.repeat_interleave(2, 1), q, True, None, False)
        assert caught.lse is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [("flash", (2, 4, 37)), ("efficient", (2, 4, 64)), ("cudnn", (2, 4, 37, 1))],
)
def test_shapes_that_aten_documents(name: str, shape: tuple[int, ...]) -> None:
    """torch's own shape functions of the kernels for GPUs: what they return is caught and read."""
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
    q = torch.empty(2, 4, 37, 16, device="meta")
    arguments = (0.0, True) if name == "flash" else (None, True, 0.0, True)
    with sdpa_lse() as caught:
        op(q, q, q, *arguments)
    assert caught.lse is not None
    assert caught.lse.shape == shape
    assert dense(caught.lse, q).shape == (2, 4, 37)
    dropped = (0.1, True) if name == "flash" else (None, True, 0.1, True)
    with sdpa_lse() as caught:
        op(q, q, q, *dropped)
    assert caught.lse is None


# ------------------------------------------------------------------------ layouts and errors


def test_packed_rows_go_back_to_their_places() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    lse = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.inf, 6.0]])
    nothing = -math.inf
    want = [
        [[nothing, 1, 2], [nothing, 4, nothing]],
        [[3, nothing, nothing], [6, nothing, nothing]],
    ]
    assert packed(lse, mask).tolist() == want
    assert packed(lse, torch.ones(1, 3, dtype=torch.bool)).shape == (1, 2, 3)


def test_sinks() -> None:
    q, k = _sides()[:2]
    lse = attend(q, k, k, kernel="sdpa_flash")[1]
    sink = torch.randn(4)
    inputs = Inputs(q, k, q, k, {"visual_mask": _visual(), "sink_s": sink})
    _compare(inputs, ROW_SPEC, "tiled", 2e-5, lse_s=add_sink(lse, sink))
    with pytest.raises(ValueError, match=r"sink has shape \[3\].*allowed: \[H\]"):
        add_sink(lse, sink[:3])


QUERY = torch.zeros(2, 4, LENGTH, 16)


@pytest.mark.parametrize(
    ("lse", "error", "message"),
    [
        (None, ValueError, "lse is None; allowed: .*return_attn_probs=True"),
        (torch.zeros(2, 4, 0), ValueError, "lse is empty.*compute_log_sumexp=True"),
        ([0.0], TypeError, "lse is list; allowed: a tensor"),
        (torch.zeros(2, 4, LENGTH).bfloat16(), TypeError, "bfloat16; allowed: float32 or float64"),
        (torch.zeros(2, LENGTH, 4), ValueError, r"\[2, 37, 4\]; allowed .*\[2, 4, 37\]"),
        (torch.zeros(2, 4, 40), ValueError, "rounded up to 64"),
        (torch.zeros(4, 74), ValueError, "goes through fastalign.lse.packed"),
    ],
    ids=["none", "empty", "list", "half", "order", "rows", "packed"],
)
def test_what_is_no_log_sum_exp(lse: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dense(lse, QUERY)


def test_packed_refuses_another_count() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lse has shape \[4, 5\]; allowed: \[H, 6\]"):
        packed(torch.zeros(4, 5), mask)
    with pytest.raises(TypeError, match=r"attention_mask is torch.float32; allowed: a bool tensor"):
        packed(torch.zeros(4, 6), mask.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": "flash"}, ValueError, "kernel is 'flash'; allowed: 'flash_attn_2'"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1; allowed: 0"),
        ({"window": 4}, ValueError, "window is given with kernel 'sdpa_flash'; allowed: .*'flex'"),
        ({"kernel": "flex", "window": 0}, ValueError, "window is 0; allowed"),
        ({"kernel": "flex", "softcap": -1.0}, ValueError, "softcap is -1.0; allowed"),
        ({"key": torch.zeros(2, 3, LENGTH, 16)}, ValueError, "key has shape .*a divisor of 4"),
        ({"value": torch.zeros(2, 2, 5, 16)}, ValueError, "value has shape"),
        ({"value": torch.zeros(2, 2, LENGTH, 16).half()}, TypeError, "value is torch.float16"),
        (
            {"kernel": "flex", "attention_mask": torch.ones(2, LENGTH)},
            ValueError,
            "attention_mask is torch.float32",
        ),
    ],
    ids=lambda x: str(x)[:30] if isinstance(x, dict) else "",
)
def test_calls_that_cannot_be_run(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    k = torch.zeros(2, 2, LENGTH, 16)
    call = {"query": QUERY, "key": k, "value": k, "kernel": "sdpa_flash", **change}
    with pytest.raises(error, match=message):
        attend(call.pop("query"), call.pop("key"), call.pop("value"), **call)


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ImportError, match=r"'flash_attn_interface'.*allowed: install flash_attn_3"):
        attend(QUERY, QUERY, QUERY, kernel="flash_attn_3")


def test_a_library_that_returns_no_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("flash_attn")
    module.flash_attn_func = lambda q, k, v, **more: q  # type: ignore[attr-defined]
    _install(monkeypatch, module)
    with pytest.raises(ValueError, match="flash_attn returned no log-sum-exp; allowed"):
        attend(QUERY, QUERY, QUERY, kernel="flash_attn_2")


def test_every_kernel_is_tested() -> None:
    assert set(KERNELS) == {*FLASH, "flex", "sdpa_flash", "sdpa_efficient"}
