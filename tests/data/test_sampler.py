"""Which samples are read does not depend on how the processes share them, also where the data begins again."""

from __future__ import annotations

from itertools import islice

import pytest

from megatron.data.sampler import MicroBatchSampler, Start

BATCH = 8


def global_batches(length: int, *, micro: int, processes: int, count: int, start: Start | None = None) -> list[list[int]]:
    """The samples of each global batch of 8, over all processes, in ascending order."""
    accumulation = BATCH // (micro * processes)
    by_rank = [
        [
            index
            for indices in islice(MicroBatchSampler(length, micro_batch=micro, rank=rank, world_size=processes, start=start), count * accumulation)
            for index in indices
        ]
        for rank in range(processes)
    ]
    each = micro * accumulation
    return [sorted(index for own in by_rank for index in own[step * each : (step + 1) * each]) for step in range(count)]


@pytest.mark.parametrize(("micro", "processes"), [(1, 1), (2, 2), (4, 2), (1, 8), (8, 1)])
@pytest.mark.parametrize("length", [64, 61, 27])
@pytest.mark.parametrize("began", [(2, 1), (2, 4), (4, 1)])
def test_another_layout_goes_on_with_the_same_samples_across_the_end_of_the_data(
    length: int, micro: int, processes: int, began: tuple[int, int]
) -> None:
    straight = global_batches(length, micro=began[0], processes=began[1], count=12)
    start = Start(3 * BATCH, began[0] * began[1])
    assert global_batches(length, micro=micro, processes=processes, count=9, start=start) == straight[3:]


def test_a_start_between_two_steps_of_the_new_size_repeats_nothing() -> None:
    sampler = MicroBatchSampler(100, micro_batch=4, rank=1, world_size=2, start=Start(12, 4))
    assert [sampler.indices(number) for number in range(2)] == [[16, 17, 18, 19], [24, 25, 26, 27]]


def test_a_step_larger_than_the_data_when_the_run_began_counts_as_now() -> None:
    assert MicroBatchSampler(10, micro_batch=2, rank=0, world_size=2, start=Start(0, 16)).period == 8
