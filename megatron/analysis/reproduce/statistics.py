"""Means with their intervals, and what they say about a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHOWN, NOT_SHOWN, REVERSED, WITHIN_NOISE = "shown", "not shown", "reversed", "within noise"
NOT_RUN = "too few runs"
"""Fewer than two pairs were run."""


@dataclass(frozen=True)
class Interval:
    """The mean of some numbers, its standard error, and Student's t interval around it. NaN where there are too few numbers."""

    mean: float
    error: float
    low: float
    high: float
    count: int


def interval_of(values: Sequence[float], confidence: float) -> Interval:
    """Of independent numbers with the same mean."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, math.nan, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = student_t(confidence, count - 1) * error
    return Interval(mean, error, mean - half, mean + half, count)


def student_t(confidence: float, freedom: int) -> float:
    """The t within which Student's distribution with so many degrees of freedom has this share."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))


def verdict(found: Interval, *, shown_above: float, reversed_below: float) -> str:
    """The first of the protocol's rules that holds."""
    if found.count < 2:
        return NOT_RUN
    if found.low > shown_above:
        return SHOWN
    if found.high < reversed_below:
        return REVERSED
    return NOT_SHOWN if found.high < shown_above else WITHIN_NOISE
