"""The backends by name, what each can do, and what ``auto`` picks.

A streaming backend is a module with ``forward`` and ``backward`` (``backends/contract.py``) and
``unsupported(problem) -> str | None``: why it cannot serve a problem, or None. Modules are imported on
first use, so that nothing here needs triton or a compiler.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from .problem import Problem

logger = logging.getLogger("fastalign")

#: ``reference`` is ``maths.align_loss`` itself and needs no operator.
MODULES = {
    "tiled": "fastalign.backends.tiled",
    "cpu": "fastalign.backends.cpu",
    "triton": "fastalign.backends.triton",
}
NAMES = ("auto", "reference", *MODULES)

#: What ``auto`` tries on a kind of device, in this order; the last can do everything.
PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("triton",),
    "xpu": ("triton",),
}
EVERYWHERE = ("tiled",)


def check_backend_name(name: str) -> None:
    """Raises ValueError for a name that is none of ours."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, NAMES))}")


def backend_for(name: str, problem: Problem) -> ModuleType:
    """The module that serves this problem; an explicit name is never replaced by another.

    Runs inside the operator, so that ``auto`` is resolved at run time, compiled or not, and the
    backward gets the same answer as the forward.

    Raises:
        ValueError: an explicit backend that cannot do this problem; names those that can.
    """
    if name != "auto":
        module = _load(name)
        reason = module.unsupported(problem)
        if reason is not None:
            able = [other for other in MODULES if other != name and _can(other, problem)]
            raise ValueError(
                f"backend is {name!r}, which cannot do {reason}; allowed: 'reference', "
                + ", ".join(map(repr, able))
            )
        return module
    device = problem.q_s.device.type
    for choice in (*PREFERENCES.get(device, ()), *EVERYWHERE):
        if _can(choice, problem):
            _log_once(device, choice)
            return _load(choice)
    raise AssertionError("tiled can do everything")


def gradients_together(name: str, device: torch.device) -> bool:
    """Whether the gradients are computed along with the loss: by the kernels for the CPU."""
    return device.type == "cpu" and name in ("auto", "cpu")


def _can(name: str, problem: Problem) -> bool:
    return _load(name).unsupported(problem) is None


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])


@cache
def _log_once(device: str, choice: str) -> None:
    logger.info("backend='auto' uses %r for tensors on %s", choice, device)
