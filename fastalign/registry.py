"""The names of the backends, which of them a device and a problem can use, and what ``auto`` picks."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType

from .problem import Problem

logger = logging.getLogger("fastalign")

#: Streaming backends: name -> module with ``forward`` and ``backward``. ``reference`` is
#: ``maths.align_loss`` itself and needs no operator.
MODULES = {"tiled": "fastalign.backends.tiled"}
NAMES = ("auto", "reference", *MODULES)


@lru_cache(maxsize=None)
def load_backend(name: str) -> ModuleType:
    """Import a streaming backend on its first use."""
    return importlib.import_module(MODULES[name])


def choose_backend(name: str, problem: Problem) -> str:
    """The backend that serves this call; an explicit name is never replaced by another.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, NAMES))}")
    if name != "auto":
        return name
    choice = "tiled"
    _log_once(problem.q_s.device.type, choice)
    return choice


@lru_cache(maxsize=None)
def _log_once(device: str, choice: str) -> None:
    logger.info("backend='auto' uses %r for tensors on %s", choice, device)
