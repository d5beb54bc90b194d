"""Which samples a rank reads at which micro-batch: arithmetic on the number of samples that were read before, so that resuming replays nothing, and
goes on with the same samples when the processes or their micro-batches are others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron.data.indexed import DatasetError


class Start(NamedTuple):
    """Where a run goes on in its data."""

    sample: int = 0
    """Samples that were read before."""
    at_once: int | None = None
    """Samples that all processes together took for one forward pass when the run began: the end of the data depends on it. None: as many as now."""


class MicroBatchSampler:
    """Endless lists of sample indices for one rank, from `start` on.

    NeoX section 5.3: samples in order, micro_batch * world_size of them a step, rank r takes the r-th slice; an incomplete
    last step is dropped and the data begins again. Raises DatasetError when there are fewer samples than one step takes.
    """

    def __init__(self, length: int, *, micro_batch: int, rank: int, world_size: int, start: Start | None = None) -> None:
        self.global_batch = micro_batch * world_size
        if length < self.global_batch:
            raise DatasetError(
                f"the data set has {length} samples, fewer than the {self.global_batch} of one step "
                f"({micro_batch} on each of {world_size} ranks); use more text, a smaller batch or a shorter seq_length"
            )
        start = start or Start()
        at_once = start.at_once if start.at_once and start.at_once <= length else self.global_batch
        self.period = length // at_once * at_once
        """The samples of one pass through the data."""
        self.micro_batch = micro_batch
        self.first = start.sample + rank * micro_batch

    def indices(self, number: int) -> list[int]:
        """This rank's samples of micro-batch `number`, counted from the start."""
        first = self.first + number * self.global_batch
        return [(first + place) % self.period for place in range(self.micro_batch)]

    def __iter__(self) -> Iterator[list[int]]:
        number = 0
        while True:
            yield self.indices(number)
            number += 1
