"""The key `split`: read here alone, for the configuration's check and for the run."""

from __future__ import annotations

import math

SPLIT_RULE = "give one to three shares of the documents for train, valid and test, each 0 or more and the first above 0, such as '969, 30, 1'"


def parse_split(split: str) -> tuple[float, float, float]:
    """The three shares, in proportion to each other, separated by commas or slashes. Missing ones are 0. Raises ValueError with SPLIT_RULE."""
    try:
        shares = [float(part) for part in split.split("," if "," in split else "/")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not math.isfinite(sum(shares)) or shares[0] == 0:
        raise ValueError(SPLIT_RULE)
    shares += [0.0] * (3 - len(shares))
    return shares[0], shares[1], shares[2]
