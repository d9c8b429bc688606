"""Reductions of attention that need no loss: for token pruning and for analysis.

Attention received per visual token and its outliers (sinks, as SToP prunes with), and the attention
that each row pays to the image as a whole (text-to-image relevance, as DSTP follows over layers). The
first comes from the streaming backend's pooled statistics, in memory that does not grow with
rows x columns; the second a tile of rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..spec import AlignSpec
from .forward import layer_forward
from .layer import LayerState, row_masses
from .observe import observe
from .tokens import Inputs, RowChoice, Rows, Tokens

_POOLED = AlignSpec(compare="pooled", divergence="mse")


def attention_received(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[int] | None = None,
    rows: Rows = "all",
    *,
    columns: str = "visual",
) -> dict[int, Tensor]:
    """Mean attention that each token receives from the rows that see it, over heads.

    Args:
        inputs: the processor's batch.
        layers: decoder layers (0-based). None: all that have softmax attention.
        rows: see ``tokens.choose_rows``.
        columns: ``"visual"`` tokens or ``"all"`` valid ones.

    Returns:
        layer -> [B, C] float32 (float64 for float64 models), C the most columns of a sample, in order
        of position, zeros after a sample's own and for tokens that no row sees.
    """
    if columns not in ("visual", "all"):
        raise ValueError(f"columns is {columns!r}; allowed: 'visual' or 'all'")
    found: dict[int, Tensor] = {}

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        compared = tokens.visual if columns == "visual" else tokens.valid
        found[layer] = received(state, choice, compared)

    observe(model, inputs, layers, rows, see)
    return found


def received(state: LayerState, choice: RowChoice, columns: Tensor) -> Tensor:
    """[B, C] of one layer: its map pooled over the rows, as the backend pools it for a loss."""
    width = int(columns.sum(-1).max())
    nothing = state.q.new_zeros((state.q.shape[0], 1, width), dtype=torch.float32)
    found = layer_forward(
        state,
        choice.positions,
        columns,
        _POOLED,
        backend="tiled",
        target=nothing,
        row_weight=choice.weight,
    )
    pooled = found.pooled[0, :, 0]  # [B, L]
    out = pooled.new_zeros(pooled.shape[0], width)
    for b, at in enumerate(columns):
        out[b, : int(at.sum())] = pooled[b, at]
    return out


def image_relevance(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[int] | None = None,
    rows: Rows = "text",
) -> dict[int, Tensor]:
    """How much of its attention each row pays to the visual tokens, mean over heads.

    Returns:
        layer -> [B, R] in [0, 1], rows in order of position, zeros after a sample's own.
    """
    found: dict[int, Tensor] = {}

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        found[layer] = row_masses(state, choice.positions, tokens.visual)

    observe(model, inputs, layers, rows, see)
    return found


def sink_scores(received: Tensor, columns: int | Tensor | None = None) -> Tensor:
    """How many standard deviations above the mean a token's received attention lies, sample by sample.

    Args:
        received: [B, C] of one layer from ``attention_received``.
        columns: how many of the C are a sample's own ([B] or one number). None: all.

    Returns:
        [B, C], zeros beyond a sample's own columns and where all tokens receive the same.
    """
    length, device = received.shape[-1], received.device
    count = torch.as_tensor(length if columns is None else columns, device=device)
    count = count.expand(received.shape[0])
    own = torch.arange(length, device=device) < count[:, None]
    size = count.clamp(min=1)[:, None]
    mean = (received * own).sum(-1, keepdim=True) / size
    spread = (((received - mean) * own).square().sum(-1, keepdim=True) / size).sqrt()
    return torch.where(own & (spread > 0), (received - mean) / spread.clamp(min=1e-30), 0.0)
