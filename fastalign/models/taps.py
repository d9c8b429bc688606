"""Who looks at the calls of which attention module, and where a layer's loss is handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calls import Call
from .links import Link, linked


def _ignore(loss: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Tap:
    """What is done with the calls of one attention module.

    Attributes:
        see: gets a call, returns the layer's loss, differentiable by the call's query and key (and by
            ``parameter``), or None.
        take: gets that loss as the model's graph has it. For a compiled layer this is not the tensor
            that ``see`` returned, and it comes when the step ends.
        parameter: a parameter of the loss itself (the learned mix of heads).
    """

    see: Callable[[Call], Tensor | None]
    take: Callable[[Tensor], None] = _ignore
    parameter: Tensor | None = None


_taps: dict[nn.Module, Tap] = {}


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants this call of a module: it has a tap, and no backward is running.

    A checkpoint runs the layer again during backward; its first run was the one that counts.
    """
    return module in _taps and torch._C._current_graph_task_id() == -1


def show(module: nn.Module, call: Call) -> None:
    """Let the module's tap see a call that is wanted."""
    tap = _taps[module]
    loss = tap.see(call)
    if loss is not None:
        tap.take(loss)


@contextmanager
def tapped(taps: Mapping[nn.Module, Tap]) -> Iterator[None]:
    """``taps`` see the calls of their modules inside.

    Raises:
        RuntimeError: a module is tapped already (steps do not nest).
    """
    for module in taps:
        if module in _taps:
            raise RuntimeError(
                f"layer {getattr(module, 'layer_idx', '?')} is captured already: a step inside a "
                "step; allowed: one step at a time for a model"
            )
    _taps.update(taps)
    links = {module: Link(module, tap.see, tap.parameter) for module, tap in taps.items()}
    try:
        with linked(links):
            yield
        for module, link in links.items():
            loss = link.collect()
            if loss is not None:
                taps[module].take(loss)
    finally:
        for module in taps:
            del _taps[module]
