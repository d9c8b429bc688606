"""Plain-torch kernels under the names of attention libraries that no CPU has.

Everything around them is transformers' own: its flash and FlexAttention functions, their masks, the
removal of padding, the packed sequences. Only the kernel itself is replaced.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

HUB = "kernels-community/flash-attn2"


def use_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers finds flash attention 2 and 3 and a kernel of the hub: the functions below."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as theirs
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask

    found = flash_attn_func, flash_attn_varlen_func, None, theirs._pad_input, theirs._unpad_input
    monkeypatch.setattr(theirs, "_lazy_imports", lambda *_, **__: found)
    monkeypatch.setattr(theirs, "_loaded_implementation", None)
    AttentionInterface.register(HUB, flash_attention_forward)  # as loading it from the hub does
    AttentionMaskInterface.register(HUB, flash_attention_mask)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """[B, T, H, D] of q [B, T, H, D] and k, v [B, T, K, D], as the library documents it."""
    assert not dropout_p
    length, repeat = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    hidden = (ahead > 0) & torch.tensor(causal)
    for distance, limit in zip((-ahead, ahead), window_size, strict=True):
        if limit >= 0:
            hidden = hidden | (distance > limit)
    scores = scores.masked_fill(hidden, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """[N, H, D]: every sequence for itself."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    out = [
        flash_attn_func(
            *(x[None] for x in part),
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            s_aux=s_aux,
        )[0]
        for part in parts
    ]
    return torch.cat(out)


def use_flex(monkeypatch: pytest.MonkeyPatch, *, lse_error: float | None = None) -> None:
    """FlexAttention without the compiler: torch's own where lse_error is None, which has no gradient.

    With a number, plain torch in its place, which returns its log-sum-exp as FlexAttention does on a
    GPU, wrong by ``lse_error``, so that a test can tell whether it was used.
    """
    from transformers import masking_utils
    from transformers.integrations import flex_attention as theirs
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    make = theirs.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **kw: make(**{**kw, "_compile": False})
    )
    if lse_error is None:
        monkeypatch.setattr(
            theirs.WrappedFlexAttention, "__call__", lambda self: theirs.flex_attention
        )
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **passed: Any
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = query.shape
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        scores = query @ key.mT * passed["scaling"]
        if passed.get("softcap"):
            scores = passed["softcap"] * torch.tanh(scores / passed["softcap"])
        place = torch.arange(length)
        seen = torch.stack(
            [
                torch.stack([attention_mask.mask_mod(torch.tensor(b), 0, i, place) for i in place])
                for b in range(batch)
            ]
        )
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num()
        if passed.get("s_aux") is not None:
            weights = weights * torch.sigmoid(lse - passed["s_aux"][:, None])[..., None]
        out = (weights @ value).transpose(1, 2)
        return out, (lse + lse_error).detach().to(value.dtype)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attention)
