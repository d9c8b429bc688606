"""Means, paired differences and their bootstrap intervals: standard library and a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` values, their standard deviation (n - 1) and an interval of the mean."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Condition minus baseline, seed by seed; ``positive`` of ``estimate.count`` seeds are above 0."""

    estimate: Estimate
    positive: int


def estimate(values: Sequence[float]) -> Estimate:
    """Percentile bootstrap of the mean, 10,000 resamples, seed 0, level 0.95.

    With five values such an interval covers the true mean less often than its level says: the spread of
    five values is small by chance often enough. One value has no interval (nan).

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values is empty; allowed: at least one")
    mean = fmean(values)
    if len(values) == 1:
        nan = float("nan")
        return Estimate(mean, nan, nan, nan, 1)
    rng = random.Random(SEED)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - LEVEL) / 2
    low, high = means[int(tail * RESAMPLES)], means[int((1 - tail) * RESAMPLES) - 1]
    return Estimate(mean, stdev(values), low, high, len(values))


def paired(ours: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Over the seeds that both have; None where there is none."""
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [ours[seed] - baseline[seed] for seed in seeds]
    return Difference(estimate(differences), sum(d > 0 for d in differences))


def reached(curve: Sequence[dict[str, object]], measure: str, threshold: float) -> int | None:
    """The index of the first entry of a run's curve with ``measure`` at ``threshold``; None: never."""
    for index, entry in enumerate(curve):
        scores = entry["scores"]
        assert isinstance(scores, dict)
        if scores[measure] >= threshold:
            return index
    return None
