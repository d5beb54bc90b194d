"""Which part of every weight a process holds: the one table that building, checkpoints and checksums read.

A weight is named and shaped as in a model of one process (the "whole" weight). A process holds some spans of it along some dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Places `start` to `stop` - 1 along one dimension of a whole weight. `owned`: this process is the one that counts for them, where several hold
    the same."""

    start: int
    stop: int
    owned: bool = True


class Box(NamedTuple):
    """A rectangular part of a weight: where it lies in the process's tensor and in the whole one, a slice for each dimension."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]
    owned: bool


class Cut(NamedTuple):
    """The part of one weight: its whole shape, and for each dimension the spans that the process holds, one after the other."""

    shape: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def is_whole(self) -> bool:
        """Whether the process holds all of it."""
        return all(tuple(span[:2] for span in spans) == ((0, size),) for size, spans in zip(self.shape, self.spans, strict=True))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the process's tensor."""
        return tuple(sum(span.stop - span.start for span in spans) for spans in self.spans)

    def boxes(self) -> Iterator[Box]:
        """The rectangular parts; together they are the process's tensor."""
        located = [list(located_spans(spans)) for spans in self.spans]
        for combination in product(*located):
            local = tuple(slice(place, place + span.stop - span.start) for place, span in combination)
            whole = tuple(slice(span.start, span.stop) for _, span in combination)
            yield Box(local, whole, all(span.owned for _, span in combination))

    def take(self, whole: Tensor) -> Tensor:
        """The process's tensor, cut from the whole weight; a copy unless it is the whole."""
        if self.is_whole:
            return whole
        local = torch.empty(self.local_shape, dtype=whole.dtype, device=whole.device)
        for box in self.boxes():
            local[box.local] = whole[box.whole]
        return local


def whole_cut(shape: Sequence[int], *, owned: bool = True) -> Cut:
    """All of a weight. `owned` False: another process counts for it."""
    return Cut(tuple(shape), tuple((Span(0, size, owned),) for size in shape))


def disowned(cut: Cut) -> Cut:
    """The same part, for which another process counts."""
    return Cut(cut.shape, tuple(tuple(span._replace(owned=False) for span in spans) for spans in cut.spans))


Cuts = Mapping[str, Cut]
"""Name -> what this process holds of the weight. Weights that are not in it: the whole, owned by the first tensor-parallel process."""


def located_spans(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the place in the process's tensor where it begins."""
    place = 0
    for span in spans:
        yield place, span
        place += span.stop - span.start
