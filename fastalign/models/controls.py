"""Controls of an alignment: other columns than the visual ones, other maps than the teacher's.

An effect of alignment means something only beside runs that differ in nothing but what is aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .layer import LayerState
from .tokens import Tokens

COLUMNS = ("visual", "text")
TARGETS = ("teacher", "shuffled", "random")

Disturb = Callable[[LayerState], LayerState]


def check_controls(columns: str, target: str) -> None:
    """Raises: ValueError: an unknown name."""
    for name, value, allowed in (("columns", columns, COLUMNS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def compared_columns(columns: str, tokens: Tokens) -> Tensor:
    """[B, L] bool: the visual tokens, or (``"text"``) the valid ones that are not visual."""
    return tokens.visual if columns == "visual" else tokens.valid & ~tokens.visual


def disturbance(
    target: str, columns: Tensor, generator: torch.Generator | None = None
) -> Disturb | None:
    """What is done to the teacher's keys for a target; None: nothing.

    ``"shuffled"``: the keys of a sample's compared columns change places, by one permutation that is
    drawn for each sample and step and is the same for all layers, heads and rows. A row that sees all
    of these columns gets its own map with the columns permuted: the same values, entropy and mass at
    other places. ``"random"``: these keys are Gaussian, each with the norm that it had.

    Args:
        columns: [B, L] bool.
        generator: a CPU generator; None: torch's own.
    """
    if target == "teacher":
        return None
    if target == "shuffled":
        order = torch.arange(columns.shape[1]).repeat(len(columns), 1)
        for row, compared in enumerate(columns.cpu()):
            at = compared.nonzero().flatten()
            order[row, at] = at[torch.randperm(len(at), generator=generator)]

        def shuffle(state: LayerState) -> LayerState:
            index = order.to(state.k.device)[:, None, :, None]
            return replace(state, k=state.k.gather(2, index.expand_as(state.k)))

        return shuffle

    def redraw(state: LayerState) -> LayerState:
        noise = torch.randn(state.k.shape, generator=generator).to(state.k)
        noise = noise * (state.k.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        drawn = columns.to(state.k.device)[:, None, :, None]
        return replace(state, k=torch.where(drawn, noise, state.k))

    return redraw
