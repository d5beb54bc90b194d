"""Intervals and verdicts against known values."""

from __future__ import annotations

import math

import pytest

from megatron.analysis.reproduce.statistics import Interval, interval_of, student_t, verdict


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227)])
def test_student_s_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert student_t(0.95, freedom) == pytest.approx(value, rel=1e-4)


def test_an_interval_by_hand() -> None:
    found = interval_of([1.0, 2.0, 3.0], 0.95)
    assert (found.mean, found.count) == (2.0, 3)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)


def test_one_number_has_no_interval_and_no_verdict() -> None:
    found = interval_of([1.0], 0.95)
    assert found.mean == 1.0
    assert math.isnan(found.low)
    assert verdict(found, shown_above=0, reversed_below=0) == verdict(interval_of([], 0.95), shown_above=0, reversed_below=0) == "too few runs"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.6, 0.9, "shown"),
        (0.4, 0.9, "within noise"),
        (-0.9, 0.9, "within noise"),
        (-0.4, 0.4, "not shown"),
        (-0.9, 0.4, "not shown"),
        (-0.9, -0.6, "reversed"),
    ],
)
def test_the_rules_of_the_protocol(low: float, high: float, expected: str) -> None:
    found = Interval(mean=(low + high) / 2, error=0.1, low=low, high=high, count=6)
    assert verdict(found, shown_above=0.5, reversed_below=-0.5) == expected
