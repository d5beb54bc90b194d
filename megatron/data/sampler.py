"""Which samples a rank reads at which micro-batch: arithmetic on the micro-batch index, so that resuming replays nothing."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.data.indexed import DatasetError


class MicroBatchSampler:
    """Endless lists of sample indices for one rank, beginning at micro-batch `start_iteration`.

    NeoX section 5.3: samples in order, micro_batch * world_size of them a step, rank r takes the r-th slice; an incomplete
    last step is dropped and the data begins again. Raises DatasetError when there are fewer samples than one step takes.
    """

    def __init__(self, length: int, *, micro_batch: int, rank: int, world_size: int, start_iteration: int = 0) -> None:
        self.global_batch = micro_batch * world_size
        if length < self.global_batch:
            raise DatasetError(
                f"the data set has {length} samples, fewer than the {self.global_batch} of one step "
                f"({micro_batch} on each of {world_size} ranks); use more text, a smaller batch or a shorter seq_length"
            )
        self.steps = length // self.global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.start_iteration = start_iteration

    def indices(self, iteration: int) -> list[int]:
        """This rank's samples of micro-batch `iteration`."""
        first = (iteration % self.steps) * self.global_batch + self.rank * self.micro_batch
        return list(range(first, first + self.micro_batch))

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self.start_iteration
        while True:
            yield self.indices(iteration)
            iteration += 1
