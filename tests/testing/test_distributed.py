"""run_distributed: values come back by rank, the failing rank's own words are raised, and no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator

import pytest
import torch

from megatron.testing.distributed import DistributedError, run_distributed
from tests.testing import rank_functions


def sum_of_ranks(factor: int) -> tuple[int, torch.Tensor]:
    total_1 = torch.full((1,), float(torch.distributed.get_rank() * factor))
    torch.distributed.all_reduce(total_1)
    return int(os.environ["RANK"]), total_1


def rank_one_raises_while_rank_zero_waits() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("only rank one says this")
    torch.distributed.barrier()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def test_values_come_back_in_the_order_of_the_ranks() -> None:
    (first, total_1), (second, same_1) = run_distributed(sum_of_ranks, 2, 10)
    assert (first, second) == (0, 1)
    assert total_1.item() == same_1.item() == 10.0


def test_without_a_backend_only_the_environment_is_set() -> None:
    assert run_distributed(rank_functions.environment, 2, backend=None) == [("0", "0", "2", "cpu"), ("1", "1", "2", "cpu")]


def test_the_ranks_find_imported_what_was_preloaded() -> None:
    assert run_distributed(rank_functions.imported_by_now, 1, "deepspeed", backend=None) == [True]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(DistributedError, match=r"(?s)^rank 1 of 2 raised.*rank_one_raises_while_rank_zero_waits.*only rank one says this"):
        run_distributed(rank_one_raises_while_rank_zero_waits, 2)


def test_a_rank_that_is_killed_is_named_and_the_others_are_ended() -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError, match="rank 1 of 2 died before it returned: killed by SIGKILL"):
        run_distributed(rank_functions.rank_one_is_killed, 2, backend=None)
    assert time.monotonic() - started < 60


def test_a_rank_that_leaves_is_named_with_its_exit_code() -> None:
    with pytest.raises(DistributedError, match="rank 1 of 2 died before it returned: exit code 3"):
        run_distributed(rank_functions.rank_one_exits, 2, backend=None)


def test_a_rank_that_hangs_is_named_with_the_place() -> None:
    with pytest.raises(DistributedError, match=r"(?s)not done after 5 s: rank 1 of 2\n.*rank_one_hangs_here"):
        run_distributed(rank_functions.rank_one_hangs_here, 2, backend=None, timeout=5)


def test_a_result_that_does_not_pickle_says_so() -> None:
    with pytest.raises(DistributedError, match="pickle"):
        run_distributed(rank_functions.returns_what_cannot_travel, 1, backend=None)


def test_no_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size = 0: at least one process is needed"):
        run_distributed(sum_of_ranks, 0, 1)
