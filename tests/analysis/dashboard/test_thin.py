"""Thinned curves keep their spikes and gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.analysis.dashboard.thin import extremes, smoothed


def test_few_points_are_all_kept() -> None:
    assert extremes(np.arange(10), np.ones(10), buckets=5).tolist() == list(range(10))
    assert extremes(np.arange(0), np.ones(0), buckets=5).tolist() == []


def test_every_spike_of_a_long_curve_is_kept() -> None:
    random = np.random.default_rng(0)
    y = random.standard_normal(100_000)
    spikes = random.choice(100_000, 50, replace=False)
    y[spikes] = 20 * np.where(np.arange(50) % 2, 1, -1)
    kept = extremes(np.arange(100_000), y, buckets=500)
    assert len(kept) <= 1002
    assert (np.diff(kept) > 0).all()
    parts = {(spike * 500 // 100_000, y[spike] > 0) for spike in spikes}
    assert {(place * 500 // 100_000, y[place] > 0) for place in kept if abs(y[place]) == 20} == parts
    assert {kept[0], kept[-1]} == {0, 99_999}


def test_the_smallest_and_the_largest_of_each_part_equal_a_plain_search() -> None:
    random = np.random.default_rng(1)
    x = np.cumsum(random.integers(1, 9, size=5000))
    y = random.standard_normal(5000)
    part = (x - x[0]) * 40 // (x[-1] - x[0] + 1)
    expected = {0, 4999}
    for number in range(40):
        (inside,) = np.nonzero(part == number)
        expected |= {int(inside[np.argmin(y[inside])]), int(inside[np.argmax(y[inside])])}
    assert set(extremes(x, y, buckets=40).tolist()) == expected


def test_parts_without_a_number_stay_gaps() -> None:
    y = np.ones(1000)
    y[300:600] = np.nan
    y[700] = np.nan
    kept = extremes(np.arange(1000), y, buckets=10)
    assert np.isnan(y[kept]).sum() == 3, "one for each of the three parts without numbers, none for the single NaN"
    assert extremes(np.arange(1000), np.full(1000, np.nan), buckets=10).size >= 10


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0, 9.0])
    assert smoothed(y, reach=1) == pytest.approx([1.0, 1.5, 3.0, 4.5, 6.0, 7.0])
    assert smoothed(y, reach=0) == pytest.approx(y, nan_ok=True)
    assert np.isnan(smoothed(np.full(4, np.nan), reach=2)).all()
