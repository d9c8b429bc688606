"""What a benchmark is: how its files are read, what is asked, and how replies become scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..distill.data.records import SampleError
from .protocols import Ask, Method, Reply, Wording

Verdict = dict[str, Any]
"""What is known of one sample once its replies are there; plain values for a line of json."""


class Sample(Protocol):
    """One entry of a benchmark; ``id`` is unique in it."""

    @property
    def id(self) -> str: ...

    @property
    def where(self) -> str: ...


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Benchmark(Generic[S]):
    """All functions are pure but ``read``.

    Attributes:
        name: on the command line. title, source: for people.
        files: what ``read`` takes, in words.
        methods: the allowed ones; the first is the default.
        lmms_eval: the task of that name there, or None.
        read: (data file or folder, image folder) -> samples. Raises SourceError, SampleError.
        ask: the calls of the model that a sample needs.
        judge: replies by the asks' parts -> what they say.
        score: samples and their verdicts -> the benchmark's numbers, fractions unless said otherwise.
    """

    name: str
    title: str
    source: str
    files: str
    methods: tuple[Method, ...]
    lmms_eval: str | None
    read: Callable[[Path, Path | None], list[S]]
    ask: Callable[[S, Wording], list[Ask]]
    judge: Callable[[S, Mapping[str, Reply]], Verdict]
    score: Callable[[Sequence[S], Sequence[Verdict]], dict[str, Any]]


def unique(samples: list[S]) -> list[S]:
    """``samples``, all ids different.

    Raises:
        SampleError: two share one.
    """
    seen: dict[str, str] = {}
    for sample in samples:
        if sample.id in seen:
            raise SampleError(sample.where, f"has the id {sample.id!r} of {seen[sample.id]}")
        seen[sample.id] = sample.where
    return samples


def mean(values: Iterable[float | bool]) -> float:
    """Raises: ValueError: no values (a score of nothing is no score)."""
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("there is nothing to average")
    return sum(numbers) / len(numbers)


def by_group(names: Sequence[str], values: Sequence[float | bool]) -> dict[str, float]:
    """Means by name, in order of first appearance."""
    groups: dict[str, list[float | bool]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(name, []).append(value)
    return {name: mean(group) for name, group in groups.items()}
