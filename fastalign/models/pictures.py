"""Maps of attention to the visual tokens, for pictures and tests: a forward without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..spec import AlignSpec, Heads
from .capture import Call, Tap, tapped
from .layer import LayerState, materialise
from .tokens import Inputs, Rows, choose_rows, read_tokens
from .view import ModelView
from .visibility import check_mask, layer_visibility


def visual_attention(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[int] | None = None,
    rows: Rows = "all",
    *,
    heads: Heads = "mean",
) -> dict[int, Tensor]:
    """Attention to the visual tokens, layer by layer, from one forward without gradients.

    The joint softmax over every visible key, cut to the visual columns, not renormalised. It equals
    what eager attention would return, while the model runs the attention that it always runs.

    Args:
        inputs: the processor's batch.
        layers: decoder layers (0-based). None: all that have softmax attention.
        rows: see ``tokens.choose_rows``; ``"last"`` is the token that predicts the next one.
        heads: ``"mean"`` over the heads, or ``"each"``.

    Returns:
        layer -> [B, R, V] float32 (float64 for float64 models), or [B, H, R, V] with heads="each".
        R and V are the most rows and visual tokens of a sample of the batch, in order of position;
        zeros after a sample's own.

    Raises:
        ValueError: a layer without softmax attention, an unknown family, rows or heads.
    """
    view = ModelView("teacher", model)
    chosen = list(view.attentions) if layers is None else list(layers)
    for layer in chosen:
        if layer not in view.attentions:
            raise ValueError(
                f"layers names {layer!r}; allowed: layers with softmax attention, "
                f"{list(view.attentions)}"
            )
    if heads not in ("mean", "each"):
        raise ValueError(f"heads is {heads!r}; allowed: 'mean' or 'each'")
    spec = AlignSpec(heads=heads)
    tokens = read_tokens(view, inputs)
    choice = choose_rows(rows, tokens, inputs)
    found: dict[int, Tensor] = {}

    def see(layer: int, call: Call) -> None:
        visibility = layer_visibility(view, layer, call, tokens, inputs)
        check_mask(view, layer, visibility, call.mask)
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else float(call.scaling)
        state = LayerState(
            choice.slice(call.query), call.key, scale, call.softcap, call.sinks, visibility
        )
        maps = materialise(state, choice.positions, tokens.visual, spec)
        found[layer] = maps.squeeze(1) if heads == "mean" else maps

    taps: dict[nn.Module, Tap] = {view.attentions[i]: partial(see, i) for i in chosen}
    with torch.no_grad(), view.capturing(), tapped(taps):
        model(**inputs)
    return found
