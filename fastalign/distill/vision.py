"""One run of the vision tower for teacher and student, where it is the same tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def tower_of(model: Any) -> nn.Module | None:
    """The vision tower of a transformers vision-language model, or None."""
    inner = getattr(model, "model", model)
    for name in ("vision_tower", "visual", "vision_model"):
        tower = getattr(inner, name, None)
        if isinstance(tower, nn.Module):
            return tower
    return None


def same_tower(student: Any, teacher: Any) -> bool:
    """Whether both towers are frozen and hold the same weights under the same names, bit for bit.

    A tower that contains the projector (Qwen-VL's) is trained in most stages, so it is not shared.
    """
    ours, theirs = tower_of(student), tower_of(teacher)
    if ours is None or theirs is None or type(ours) is not type(theirs):
        return False
    if any(p.requires_grad for p in ours.parameters()):
        return False
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape
        and x.dtype == b[name].dtype
        and torch.equal(x, b[name].to(x.device))
        for name, x in a.items()
    )


@contextmanager
def shared_tower(student: Any, teacher: Any) -> Iterator[None]:
    """Inside, what the teacher's tower gives is what the student's tower gives, without a run.

    The teacher must run first. The projectors stay each model's own.

    Raises:
        RuntimeError: the student's tower is called and the teacher's was not.
    """
    ours, theirs = tower_of(student), tower_of(teacher)
    assert ours is not None and theirs is not None
    seen: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output)

    def reuse(*arguments: Any, **keywords: Any) -> Any:
        if len(seen) != 1:
            raise RuntimeError(
                f"the vision tower is shared and the teacher's ran {len(seen)} times before the "
                "student's; allowed: the teacher once, then the student"
            )
        return seen[0]

    handle = theirs.register_forward_hook(keep)
    before = ours.__dict__.get("forward")
    ours.forward = reuse
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            del ours.forward
        else:
            ours.forward = before
