"""Where a process stands: one process, several, and numbers that do not fit."""

from __future__ import annotations

import pytest

from megatron.mpu.topology import Topology, TopologyError, current_topology
from megatron.testing.distributed import run_distributed


def test_without_a_process_group_there_is_one_process() -> None:
    assert current_topology() == Topology(world_size=1, rank=0, local_rank=0)
    assert Topology().is_first


def topology_here() -> Topology:
    return current_topology()


def test_every_process_is_a_replica() -> None:
    first, second = run_distributed(topology_here, 2)
    assert (first.data_parallel_size, first.data_parallel_rank, first.is_first) == (2, 0, True)
    assert (second.data_parallel_size, second.data_parallel_rank, second.local_rank, second.is_first) == (2, 1, 1, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"world_size": 0}, "world_size = 0: must be at least 1"),
        ({"world_size": 2, "rank": 2}, "rank = 2: must be from 0 to 1"),
        ({"world_size": 2, "local_rank": -1}, "local_rank = -1: must be from 0 to 1"),
    ],
)
def test_numbers_that_do_not_fit(values: dict[str, int], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology(**values)


def local_rank_error(_given: str) -> str:
    import os

    os.environ["LOCAL_RANK"] = _given
    try:
        current_topology()
    except TopologyError as error:
        return str(error)
    return "no error"


def test_a_local_rank_that_is_no_number() -> None:
    assert "LOCAL_RANK = 'one': must be a number from 0" in run_distributed(local_rank_error, 1, "one")[0]
