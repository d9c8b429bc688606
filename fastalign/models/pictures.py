"""Maps of attention to the visual tokens, for pictures and tests: a forward without gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..spec import AlignSpec, Heads
from .layer import LayerState, materialise
from .observe import observe
from .tokens import Inputs, RowChoice, Rows, Tokens


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
    if heads not in ("mean", "each"):
        raise ValueError(f"heads is {heads!r}; allowed: 'mean' or 'each'")
    spec = AlignSpec(heads=heads)
    found: dict[int, Tensor] = {}

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        maps = materialise(state, choice.positions, tokens.visual, spec)
        found[layer] = maps.squeeze(1) if heads == "mean" else maps

    observe(model, inputs, layers, rows, see)
    return found
