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
    """The t within which Student's distribution with so many degrees of freedom has this share.

    With t = sqrt(n) tan(a), the density of a is proportional to cos(a)^(n - 1).
    """
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, share / share[-1], angle)))


def verdict(found: Interval, *, shown_above: float, reversed_below: float) -> str:
    """The first of the protocol's rules that holds."""
    if found.count < 2:
        return NOT_RUN
    if found.low > shown_above:
        return SHOWN
    if found.high < reversed_below:
        return REVERSED
    return NOT_SHOWN if found.high < shown_above else WITHIN_NOISE
