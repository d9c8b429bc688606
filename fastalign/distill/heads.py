"""A model's last hidden states, with or without the logits that its head makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class HeadTap:
    """What the output head of a model was given in the forward that ran inside ``tapped_head``."""

    def __init__(self, role: str, head: nn.Module) -> None:
        self.role = role
        self.head = head
        self.states: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        """[B, L, d], with the gradient's history."""
        if len(self.states) != 1:
            raise RuntimeError(
                f"the {self.role}'s output head ran {len(self.states)} times in one forward; "
                "allowed: once"
            )
        return self.states[0]

    @property
    def weight(self) -> Tensor:
        weight: Any = self.head.weight
        return weight  # type: ignore[no-any-return]


@contextmanager
def tapped_head(role: str, model: Any, *, headless: bool) -> Iterator[HeadTap]:
    """See what the head of ``model`` gets; ``headless``: it hands that on instead of logits.

    Headless, the model's own forward runs as it is (also inside DistributedDataParallel), and
    ``outputs.logits`` are the hidden states: the [B, L, vocabulary] tensor never exists.

    Raises:
        ValueError: headless, and the head is not a plain linear layer without bias.
    """
    head: Any = model.get_output_embeddings()
    tap = HeadTap(role, head)
    if headless and (type(head) is not nn.Linear or head.bias is not None):
        what = "a bias" if isinstance(head, nn.Linear) else f"the type {type(head).__name__}"
        raise ValueError(
            f"fused_head is True and the {role}'s output head has {what}; allowed: "
            "fused_head=False, or a plain linear head without bias"
        )

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        tap.states.append(arguments[0])

    handle = head.register_forward_pre_hook(see)
    before = head.__dict__.get("forward")
    if headless:
        head.forward = partial(_headless, head)
    try:
        yield tap
    finally:
        handle.remove()
        if headless:
            if before is None:
                del head.forward
            else:
                head.forward = before


def check_headless(tap: HeadTap, logits: Tensor) -> None:
    """Raises: ValueError: the model does something to its logits (a softcap, a scale)."""
    if logits.shape != tap.hidden.shape or not torch.equal(
        logits.detach().to(tap.hidden.dtype), tap.hidden.detach()
    ):
        raise ValueError(
            f"fused_head is True and the {tap.role} changes its logits after the head (softcap or "
            "scale); allowed: fused_head=False"
        )


def _headless(head: nn.Module, x: Tensor) -> Tensor:
    weight: Any = head.weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return x
    reached: Tensor = _Reached.apply(x, weight)
    return reached


class _Reached(torch.autograd.Function):
    """x itself, with ``weight`` in its history; the weight's gradient comes from the loss.

    DistributedDataParallel looks for the parameters that a forward's output depends on and counts the
    others as done at once. The head's weight is used only behind the forward, so without this it
    would be reduced before it has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
