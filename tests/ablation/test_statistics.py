"""Estimates by hand, by enumeration, and by what is known of them."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest

from fastalign.ablation.statistics import estimate, paired, reached


def test_the_interval_is_that_of_all_resamples() -> None:
    """Three values have 27 resamples: their exact quantiles, up to the error of 10,000 draws."""
    values = [0.1, 0.5, 0.9]
    every = sorted(fmean(c) for c in itertools.product(values, repeat=3))
    found = estimate(values)
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(0.4)
    # 1 of 27 resamples lies at either end: more than 2.5 % of them
    assert (found.low, found.high) == pytest.approx((every[0], every[-1]))


def test_the_interval_is_fixed_scales_and_shifts() -> None:
    values = [0.3, 0.1, 0.4, 0.15, 0.92]
    one, two = estimate(values), estimate([10 * v + 1 for v in values])
    assert estimate(values) == one
    assert (two.low, two.high) == pytest.approx((10 * one.low + 1, 10 * one.high + 1))
    assert one.low < one.mean < one.high


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert math.isnan(estimate([0.5]).low)
    with pytest.raises(ValueError, match="values is empty"):
        estimate([])


def test_pairing_removes_what_seeds_share() -> None:
    baseline = {seed: float(seed) for seed in range(5)}
    ours = {seed: seed + 0.1 + 0.01 * (seed % 2) for seed in range(5)}
    found = paired(ours, baseline)
    assert found is not None
    assert found.positive == found.estimate.count == 5
    assert found.estimate.mean == pytest.approx(0.104)
    assert found.estimate.high - found.estimate.low < 0.02
    unpaired = estimate(list(ours.values()))
    assert unpaired.high - unpaired.low > 1


def test_only_shared_seeds_are_paired() -> None:
    found = paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 0.0})
    assert found is not None
    assert (found.estimate.mean, found.estimate.count) == (0.5, 1)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_reached_is_the_first_time() -> None:
    curve: list[dict[str, object]] = [{"scores": {"x": v}} for v in (0.1, 0.6, 0.4, 0.7)]
    assert reached(curve, "x", 0.5) == 1
    assert reached(curve, "x", 0.9) is None
