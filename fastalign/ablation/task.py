"""What a study asks of the code that trains one model under one condition."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor

from ..distill.plain import RecipeError, from_plain, to_plain
from .study import Study, StudyError


class Task(Protocol):
    """One training. A function of settings and seed alone: two of them agree bit for bit.

    Attributes:
        Settings: a dataclass of plain values with defaults.
        SOURCES: modules and packages on whose code the result depends; runs of different code are not
            compared.
        steps: optimiser steps of a whole training.
    """

    Settings: ClassVar[type]
    SOURCES: ClassVar[tuple[str, ...]]
    steps: int

    def __init__(self, settings: Any, seed: int) -> None: ...

    def step(self, number: int) -> dict[str, float]:
        """Optimiser step ``number`` (0-based); returns what is worth noting, losses say."""
        ...

    def score(self, *, final: bool) -> dict[str, float]:
        """Scores now: quick ones along the way, all of them in the end. Must not touch the training."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold: tensors, numbers, texts, lists and mappings."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The trained model's weights."""
        ...


def find_task(study: Study) -> type[Task]:
    """The class that ``study.task`` names.

    Raises:
        StudyError: there is none.
    """
    module, _, name = study.task.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not look there by itself
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"task is {study.task!r}: {error}; allowed: 'module:Class' that can be imported from "
            "the working directory"
        ) from None
    return cast(type[Task], found)


def config_of(study: Study, task: type[Task], condition: str) -> dict[str, Any]:
    """The full configuration of a condition, defaults included, as plain values.

    Raises:
        StudyError: an entry that the task's settings do not have, or a wrong value.
    """
    try:
        settings: Any = from_plain(
            task.Settings, study.settings_of(condition), f"conditions.{condition}"
        )
    except RecipeError as error:
        raise StudyError(str(error)) from None
    return cast(dict[str, Any], to_plain(settings))


def settings_from(task: type[Task], config: Mapping[str, Any]) -> Any:
    """The settings that a full configuration describes."""
    return from_plain(task.Settings, config, "config")
