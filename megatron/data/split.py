"""`split: "969, 30, 1"` -> document ranges for training, validation and test (NeoX section 5.3)."""

from __future__ import annotations

from megatron.config import split as rule
from megatron.data.indexed import DatasetError

SPLITS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """The three shares, relative to each other. Missing ones are 0. Raises DatasetError."""
    try:
        return rule.parse_split(split)
    except ValueError as error:
        raise DatasetError(f"split = {split!r}: {error}") from None


def split_documents(split: str, count: int) -> tuple[range, range, range]:
    """Ranges of documents of a file with `count` documents. Shares are rounded one by one, and the rounding error is subtracted from every
    boundary."""
    shares = parse_split(split)
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * float(count)))
    error = bounds[-1] - count
    bounds = [0, *(bound - error for bound in bounds[1:])]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])
