"""One forward without gradients, of which each chosen layer's q and k are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .layer import LayerState
from .taps import Tap, tapped
from .tokens import Inputs, RowChoice, Rows, Tokens, choose_rows, read_tokens
from .view import ModelView
from .visibility import check_mask, layer_visibility


def state_of(
    view: ModelView, layer: int, call: Call, tokens: Tokens, rows: RowChoice, inputs: Inputs
) -> LayerState:
    """What a call says, with the chosen rows of q.

    Raises:
        RuntimeError: a call that is not of the whole sequence.
    """
    length = tokens.valid.shape[1]
    if call.query.shape[2] != length or call.key.shape[2] != length:
        raise RuntimeError(
            f"{view.role} layer {layer} ran with {call.query.shape[2]} queries and "
            f"{call.key.shape[2]} keys, and the step's batch has length {length}; allowed: "
            "whole sequences without a filled cache (generate outside of the step)"
        )
    return LayerState(
        q=rows.slice(call.query),
        k=call.key,
        scale=call.query.shape[-1] ** -0.5 if call.scaling is None else float(call.scaling),
        softcap=call.softcap,
        sinks=call.sinks,
        lse=_joint_lse(call, rows),
        visibility=layer_visibility(view, layer, call, tokens, inputs, rows.positions),
    )


def _joint_lse(call: Call, rows: RowChoice) -> Tensor | None:
    """[B, H, R] of the chosen rows, the sinks' part added, where the attention returned it."""
    if call.lse is None:
        return None
    lse = rows.slice(call.lse.detach().unsqueeze(-1)).squeeze(-1)
    return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.detach()[:, None].to(lse))


def observe(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[int] | None,
    rows: Rows,
    see: Callable[[int, LayerState, RowChoice, Tokens], None],
    generator: torch.Generator | None = None,
) -> Any:
    """``model(**inputs)``, labels left out; ``see`` gets each layer's state, in the order of their run.

    Args:
        layers: None: all that have softmax attention.

    Raises:
        ValueError: a layer without softmax attention, and what ``read_tokens``, ``choose_rows`` raise.
    """
    view = ModelView("teacher", model)
    chosen = list(view.attentions) if layers is None else list(layers)
    for layer in chosen:
        if layer not in view.attentions:
            raise ValueError(
                f"layers names {layer!r}; allowed: layers with softmax attention, "
                f"{list(view.attentions)}"
            )
    tokens = read_tokens(view, inputs)
    choice = choose_rows(rows, tokens, inputs, generator)

    def tap(layer: int, call: Call) -> None:
        state = state_of(view, layer, call, tokens, choice, inputs)
        check_mask(view, layer, state.visibility, call, inputs)
        see(layer, state.detach(), choice, tokens)

    taps: dict[nn.Module, Tap] = {view.attentions[i]: Tap(partial(tap, i)) for i in chosen}
    runnable: Any = model
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), view.capturing(), tapped(taps):
        return runnable(**unlabelled)
