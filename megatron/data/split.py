"""`split: "969, 30, 1"` -> document ranges for training, validation and test (NeoX section 5.3)."""

from __future__ import annotations

import math

from megatron.data.indexed import DatasetError

SPLITS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """The three shares, in proportion to each other. Missing ones are 0. Raises DatasetError."""
    parts = split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = [-1.0]
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not math.isfinite(sum(shares)) or sum(shares) == 0:
        raise DatasetError(f"split = {split!r}: give one to three shares of the documents for train, valid and test, such as '969, 30, 1'")
    shares += [0.0] * (3 - len(shares))
    return shares[0], shares[1], shares[2]


def split_documents(split: str, count: int) -> tuple[range, range, range]:
    """Ranges of documents of a file with `count`: shares rounded one by one, the rounding error taken off every boundary."""
    shares = parse_split(split)
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * float(count)))
    error = bounds[-1] - count
    bounds = [0, *(bound - error for bound in bounds[1:])]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])
