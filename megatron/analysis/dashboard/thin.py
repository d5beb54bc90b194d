"""Fewer points, so that a curve of 100,000 steps is drawn at once and its spikes are still there.

Shapes: N points, in the order of x.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


def extremes(x_N: Steps, y_N: Numbers, *, buckets: int) -> npt.NDArray[np.int64]:
    """The places of the points to keep: the smallest and the largest y of each of `buckets` equal parts of the x axis, and the first and last point.

    At most 2 * buckets + 2. A part in which no y is finite keeps one of its points, so that the curve has a gap there. With few points: all.
    """
    count = len(x_N)
    if count <= 2 * buckets:
        return np.arange(count)
    span = max(1, int(x_N[-1]) - int(x_N[0]) + 1)
    bucket_N = (x_N - x_N[0]) * buckets // span
    unknown_N = ~np.isfinite(y_N)
    order = np.lexsort((y_N, unknown_N, bucket_N))
    sorted_N = bucket_N[order]
    starts = np.flatnonzero(np.diff(sorted_N, prepend=-1))
    finite = np.add.reduceat((~unknown_N[order]).astype(np.int64), starts)
    lasts = np.where(finite > 0, starts + finite - 1, starts)
    return np.unique(np.concatenate([order[starts], order[lasts], [0, count - 1]]))


def smoothed(y_N: Numbers, *, reach: int) -> Numbers:
    """For each value the mean of the finite ones among itself and up to `reach` neighbours on each side. The curve begins at the first value, and
    ends at the mean of the last `reach` + 1. NaN where none is finite."""
    count = len(y_N)
    finite_N = np.isfinite(y_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_N, y_N, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite_N)])
    place = np.arange(count)
    begin, end = place - np.minimum(reach, place), np.minimum(place + np.minimum(reach, place), count - 1) + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Numbers = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    return mean
