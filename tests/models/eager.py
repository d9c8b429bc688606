"""The alignment written the other way: eager attention, output_attentions, whole maps, plain torch.

Independent of fastalign: what the capture and the fused loss are measured against.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def eager_copy(model: Any) -> Any:
    """A copy with eager attention in the decoder (and the same weights)."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def attentions(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[int, Tensor]]:
    """(output, layer -> weights [B, H, L, L]) of a model with eager attention."""
    output = model(**inputs, output_attentions=True)
    weights = [w for w in output.attentions if w is not None]
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    layers = decoder.model.layers if layers is None else layers
    places = [i for i, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    assert len(places) == len(weights)
    return output, dict(zip(places, weights, strict=True))


def visual_mask(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """[B, L] image tokens."""
    ids = inputs["input_ids"]
    mask = ids == model.config.image_token_id
    if getattr(model.config, "video_token_id", None) is not None:
        mask = mask | (ids == model.config.video_token_id)
    return mask


def cosine_loss(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    matching: Mapping[int, Sequence[int]],
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """CompoDistill's formula: 1 - cos of flat head-mean maps, mean over samples and layers.

    rows, columns: [B, L] bool.
    """
    losses = []
    for layer, group in matching.items():
        s = student[layer].mean(1)
        t = torch.stack([teacher[j].mean(1) for j in group]).mean(0)
        terms = []
        for b in range(len(rows)):
            x = s[b][rows[b]][:, columns[b]].float().flatten()
            y = t[b][rows[b]][:, columns[b]].float().flatten()
            if x.numel() and bool(y.any()):
                terms.append(1 - x @ y / (x.norm() * y.norm()))
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """Parameter name -> gradient, of those that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """|ours - theirs| / |theirs| over all parameters as one vector.

    A parameter that has a gradient on one side only counts with that gradient.
    """
    difference, size = 0.0, 0.0
    for name in {*ours, *theirs}:
        a, b = ours.get(name), theirs.get(name)
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return (difference / size) ** 0.5


_recorded: dict[int, Tensor] = {}


def recorded(
    model: Any, inputs: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Any, dict[int, Tensor]]:
    """(output, layer -> weights [B, H, L, L] in ``dtype``) of the attention that really runs.

    The softmax is recomputed from the very q and k of the call and *the mask as it arrives*, so that
    neither the rounding of eager attention nor any description of masks comes in. Differentiable.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    base = config._attn_implementation
    AttentionInterface.register(f"recorder_{base[0]}", partial(_recorder, dtype))
    AttentionMaskInterface.register(f"recorder_{base[0]}", ALL_MASK_ATTENTION_FUNCTIONS[base])
    _recorded.clear()
    config._attn_implementation = f"recorder_{base[0]}"
    try:
        output = model(**inputs)
    finally:
        config._attn_implementation = base
    return output, dict(_recorded)


def _recorder(
    dtype: torch.dtype,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q, k = query.to(dtype), key.to(dtype)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * kwargs["scaling"]
    if kwargs.get("softcap"):
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    mask = attention_mask
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    elif mask.dtype != torch.bool:
        mask = mask == 0
    scores = scores.masked_fill(~mask, -1e30)
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    _recorded[module.layer_idx] = weights
    if module.config._attn_implementation == "recorder_s":
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    else:
        function = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, **kwargs)
