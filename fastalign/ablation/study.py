"""A study: conditions that change named settings of one task, over the same seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distill.plain import from_plain


class StudyError(ValueError):
    """A study that cannot be run or read; the message names the entry and what is allowed."""


@dataclass(frozen=True)
class Study:
    """What ``fastalign ablate`` runs.

    Attributes:
        name: of the study.
        task: ``module:Class``, see ``task.Task``; the module is looked for in the working directory,
            too.
        settings: entries of the task's settings that all runs share.
        conditions: name -> the entries that this condition changes. An entry is replaced as a whole.
            Only what a condition names here may differ between runs that are compared.
        seeds: every condition is run with each. Runs are made seed by seed, conditions in this order.
        compare: pairs (condition, baseline) whose paired differences are reported.
        measures: final scores that the table shows; the first is the study's outcome.
        thresholds: of the first measure along the way: when is each reached?
        score_every, checkpoint_every: steps.
        may_differ: entries of a record's ``environment`` that need not be the same in all runs.
        records: folder of the run records, relative to the study's file.
        note: free text, for readers.
    """

    name: str
    task: str
    conditions: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    measures: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    compare: tuple[tuple[str, ...], ...] = ()
    thresholds: tuple[float, ...] = ()
    score_every: int = 50
    checkpoint_every: int = 100
    may_differ: tuple[str, ...] = ()
    records: str = "runs"
    note: str = ""
    folder: str = field(default=".", compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.]+:\w+", self.task):
            raise ValueError(f"task is {self.task!r}; allowed: 'module:Class'")
        for entry, values in (("conditions", self.conditions), ("measures", self.measures)):
            if not values:
                raise ValueError(f"{entry} is empty; allowed: at least one")
        for name in self.conditions:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(
                    f"a condition is called {name!r}; allowed: small letters, digits and _"
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; allowed: at least one, none twice")
        for name in ("score_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.checkpoint_every % self.score_every:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every} and score_every {self.score_every}; "
                "allowed: a multiple of it"
            )
        for pair in self.compare:
            if len(pair) != 2 or any(name not in self.conditions for name in pair):
                raise ValueError(
                    f"compare has {list(pair)}; allowed: pairs of {', '.join(self.conditions)}"
                )

    def settings_of(self, condition: str) -> dict[str, Any]:
        """The entries of a run, before the task's defaults."""
        return {**self.settings, **self.conditions[condition]}

    def runs(self) -> list[tuple[str, int]]:
        """(condition, seed) of all runs in the order in which they are made."""
        return [(condition, seed) for seed in self.seeds for condition in self.conditions]

    @property
    def records_folder(self) -> Path:
        return Path(self.folder) / self.records


def load_study(path: Path) -> Study:
    """Reads a YAML file.

    Raises:
        StudyError: no such file, no YAML, or what is wrong in it.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is no YAML: {error}") from None
    if isinstance(values, dict):
        conditions = values.get("conditions")
        if isinstance(conditions, dict):  # "kd:" with nothing after it changes nothing
            values["conditions"] = {name: entry or {} for name, entry in conditions.items()}
        values["folder"] = str(path.parent)
    try:
        return from_plain(Study, values, "study")
    except ValueError as error:
        raise StudyError(f"{path}: {error}") from None
