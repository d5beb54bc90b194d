"""Copying between two divisions of the same weight: what one process of a model stored, into what a process of another layout holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

from megatron.model.division import Cut, Span, located_spans

Slices = tuple[slice, ...]


def copy_part(target: Tensor, target_cut: Cut, source: Tensor, source_cut: Cut) -> int:
    """Copies the elements that both hold, and returns their number. What `source` does not count for (`Span.owned`) is left out.

    `target` and `source` have the local shapes of their cuts.
    """
    copied = 0
    for into, from_ in overlaps(target_cut, source_cut):
        part = target[into]
        part.copy_(source[from_])
        copied += part.numel()
    return copied


def overlaps(target: Cut, source: Cut) -> Iterator[tuple[Slices, Slices]]:
    """The rectangles that both cuts hold: where each lies in the target's tensor and in the source's."""
    by_dimension = [list(_overlaps(own, other)) for own, other in zip(target.spans, source.spans, strict=True)]
    for combination in product(*by_dimension):
        yield tuple(own for own, _ in combination), tuple(other for _, other in combination)


def count_within(target: Cut, shape: Sequence[int]) -> int:
    """How many elements of the target's tensor lie inside a whole tensor of this shape (which may have fewer rows than the target's)."""
    count = 1
    for spans, size in zip(target.spans, shape, strict=True):
        count *= sum(max(0, min(span.stop, size) - span.start) for span in spans)
    return count


def _overlaps(target: Sequence[Span], source: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    for place, own in located_spans(target):
        for other_place, other in located_spans(source):
            start, stop = max(own.start, other.start), min(own.stop, other.stop)
            if other.owned and start < stop:
                yield (
                    slice(place + start - own.start, place + stop - own.start),
                    slice(other_place + start - other.start, other_place + stop - other.start),
                )
