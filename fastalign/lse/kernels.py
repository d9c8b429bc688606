"""Attention kernels run so that they return their log-sum-exp too, each behind the same call.

None is a dependency: a library is imported when its kernel is named.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .convert import dense, packed
from .watch import sdpa_lse


@dataclass(frozen=True)
class Attention:
    """One call, in this project's terms: q [B, H, L, D]; k, v [B, K, L, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Kernel:
    """How a kernel is run, and what it can do beyond causal and full attention."""

    run: Callable[[Attention], tuple[Tensor, Tensor]]
    extras: frozenset[str]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: str,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, by the kernel that is named and no other.

    The arguments mean what they mean in ``fused_attn_align_loss``, so that the second result is the
    ``lse_s`` or ``lse_t`` of a call with the same ones. Sinks are not among them: ``add_sink``.

    Args:
        query: [B, H, L, D]. key, value: [B, K, L, D] on the same device and of the same type, K divides
            H. Any strides.
        kernel: "flash_attn_2", "flash_attn_3", "flash_attn_4" (the libraries, CUDA or ROCm); "flex"
            (FlexAttention, compiled; on a CPU its eager form, which holds all scores); "sdpa_flash" (aten's
            flash kernels, CPU and CUDA); "sdpa_efficient" (aten's memory-efficient kernel, CUDA).
        causal: whether later keys are hidden.
        attention_mask: [B, L] bool, False for padding on the left or right; not for "sdpa_*", whose
            mask would be L x L (call it yourself inside ``sdpa_lse``).
        scale: factor of q k^T. None: 1 / sqrt(D).
        window, softcap: as in ``fused_attn_align_loss``; not for "sdpa_*".
        dropout_p: must be 0. The compared maps have no dropout.

    Returns:
        (output [B, H, L, D], log-sum-exp [B, H, L] in float32, or float64 for float64 inputs, without
        gradient). Padding and rows that see no key: the output is 0 or finite, the log-sum-exp is of no
        meaning and is not read for rows that see nothing.

    Raises:
        ValueError: a kernel that is not listed or cannot do what is asked; dropout; shapes that do
            not fit; a kernel that returned no log-sum-exp. TypeError: not tensors, mixed types.
        ImportError: the kernel's library is not installed.
        RuntimeError: from the kernel itself (a type, size or device that it does not take).
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; allowed: {', '.join(map(repr, KERNELS))}")
    if dropout_p:
        raise ValueError(
            f"dropout_p is {dropout_p!r}; allowed: 0 (the maps that are compared have no dropout)"
        )
    _check_shapes(query, key, value, attention_mask)
    asked = {
        "attention_mask": attention_mask is not None,
        "window": window is not None,
        "softcap": softcap is not None,
    }
    for name, given in asked.items():
        if given and name not in KERNELS[kernel].extras:
            able = [repr(k) for k, other in KERNELS.items() if name in other.extras]
            raise ValueError(
                f"{name} is given with kernel {kernel!r}; allowed: None, or kernel {', '.join(able)}"
            )
    if window is not None and (isinstance(window, bool) or window < 1):
        raise ValueError(f"window is {window!r}; allowed: None or an integer of at least 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap!r}; allowed: None or a finite number > 0")
    call = Attention(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window or 0,
        softcap=softcap or 0.0,
    )
    return KERNELS[kernel].run(call)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}; allowed: a tensor")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; allowed: four dimensions [B, heads, L, D]"
            )
        if x.dtype != query.dtype:
            raise TypeError(f"{name} is {x.dtype}; allowed: {query.dtype}, as query")
    batch, heads, length, size = query.shape
    if key.shape != (batch, key.shape[1], length, size) or heads % max(1, key.shape[1]):
        raise ValueError(
            f"key has shape {list(key.shape)}; allowed: [{batch}, K, {length}, {size}], K a divisor of "
            f"{heads}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value has shape {list(value.shape)}; allowed: {list(key.shape[:3])} and a head size"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
        raise ValueError(
            f"attention_mask is {mask.dtype} of shape {list(mask.shape)}; allowed: bool, "
            f"{[batch, length]}"
        )


# ------------------------------------------------------------------------------ flash_attn


def _flash_attn_2(call: Attention) -> tuple[Tensor, Tensor]:
    # the probabilities themselves are only made when there is dropout
    module, extra = "flash_attn", {"dropout_p": 0.0, "return_attn_probs": True}
    return _flash_attn(call, module, "flash_attn", -1, extra)


def _flash_attn_3(call: Attention) -> tuple[Tensor, Tensor]:
    return _flash_attn(
        call, "flash_attn_interface", "flash_attn_3 (hopper/)", -1, {"return_attn_probs": True}
    )


def _flash_attn_4(call: Attention) -> tuple[Tensor, Tensor]:
    return _flash_attn(call, "flash_attn.cute", "flash-attn-4", None, {"return_lse": True})


def _flash_attn(
    call: Attention, module: str, package: str, unlimited: int | None, extra: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The three have one layout, [B, L, H, D] or packed [total, H, D], and their own names for things.

    A window counts the keys to the left and to the right of the row's own, both included.
    """
    library = _library(module, package)
    reach = call.window - 1 if call.window else unlimited
    keywords: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size": (reach, 0 if call.causal and call.window else reach),
        "softcap": call.softcap,
        **extra,
    }
    if call.mask is None:
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        out, lse = _two(library.flash_attn_func(q, k, v, **keywords), module)
        return out.transpose(1, 2), dense(lse, call.query)
    q, k, v = (x.transpose(1, 2)[call.mask] for x in (call.query, call.key, call.value))
    lengths = call.mask.sum(1)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max()) if lengths.numel() else 0
    packing = {
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest),
    }
    out, lse = _two(library.flash_attn_varlen_func(q, k, v, **packing, **keywords), module)
    whole = out.new_zeros((*call.mask.shape, *out.shape[1:]))
    whole = whole.index_put((call.mask,), out)
    return whole.transpose(1, 2), packed(lse, call.mask)


def _two(result: Any, module: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, the first two of what a kernel returns."""
    if not isinstance(result, (tuple, list)) or len(result) < 2 or result[1] is None:
        raise ValueError(
            f"{module} returned no log-sum-exp; allowed: a version whose functions return it beside the "
            "output"
        )
    return result[0], result[1]


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the kernel needs the module {module!r}, which cannot be imported ({error}); allowed: "
            f"install {package}, or another kernel of {', '.join(map(repr, KERNELS))}"
        ) from error


# --------------------------------------------------------------------------- FlexAttention


def _flex(call: Attention) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as flex

    length = call.query.shape[2]
    hidden = call.causal or call.window or call.mask is not None
    block_mask = None
    if hidden:
        block_mask = flex.create_block_mask(
            _visible(call),
            B=None if call.mask is None else len(call.mask),
            H=None,
            Q_LEN=length,
            KV_LEN=length,
            device=str(call.query.device),
        )
    asks_aux = hasattr(flex, "AuxRequest")  # torch 2.9; return_lse before
    lse_wanted: dict[str, Any] = (
        {"return_aux": flex.AuxRequest(lse=True)} if asks_aux else {"return_lse": True}
    )
    # inductor's kernel for CPUs returns no log-sum-exp
    run = flex.flex_attention if call.query.device.type == "cpu" else _compiled_flex()
    out, second = run(
        call.query,
        call.key,
        call.value,
        score_mod=_capped(call.softcap) if call.softcap else None,
        block_mask=block_mask,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
        **lse_wanted,
    )
    return out, dense(second.lse if asks_aux else second, call.query)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _visible(call: Attention) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        see = j <= i if call.causal else j == j
        if call.window:
            see = see & ((i - j).abs() < call.window)
        return see if call.mask is None else see & call.mask[b, j]

    return visible


def _capped(cap: float) -> Callable[..., Tensor]:
    def score(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(x / cap)

    return score


# ------------------------------------------------------------------------------------ aten


def _sdpa_flash(call: Attention) -> tuple[Tensor, Tensor]:
    return _sdpa(call, "FLASH_ATTENTION")


def _sdpa_efficient(call: Attention) -> tuple[Tensor, Tensor]:
    repeat = call.query.shape[1] // call.key.shape[1]  # it takes no shared key heads
    k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (call.key, call.value))
    call = replace(call, key=k, value=v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, k, v)):
        return _sdpa(call, "EFFICIENT_ATTENTION")
    # it keeps its log-sum-exp only where a backward may follow
    with torch.enable_grad():
        query = call.query.detach().requires_grad_()
        out, lse = _sdpa(replace(call, query=query), "EFFICIENT_ATTENTION")
    return out.detach(), lse


def _sdpa(call: Attention, backend: str) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)), sdpa_lse() as caught:
        out = F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            is_causal=call.causal,
            scale=call.scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
        )
    return out, dense(caught.lse, call.query)


_ALL = frozenset({"attention_mask", "window", "softcap"})

#: What ``attend`` can run, by name.
KERNELS: dict[str, Kernel] = {
    "flash_attn_2": Kernel(_flash_attn_2, _ALL),
    "flash_attn_3": Kernel(_flash_attn_3, _ALL),
    "flash_attn_4": Kernel(_flash_attn_4, _ALL),
    "flex": Kernel(_flex, _ALL),
    "sdpa_flash": Kernel(_sdpa_flash, frozenset()),
    "sdpa_efficient": Kernel(_sdpa_efficient, frozenset()),
}
