"""run_distributed: values come back by rank, the failing rank's own words are raised, and no process is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from megatron.testing.distributed import DistributedError, run_distributed


def sum_of_ranks(factor: int) -> tuple[int, torch.Tensor]:
    total_1 = torch.full((1,), float(torch.distributed.get_rank() * factor))
    torch.distributed.all_reduce(total_1)
    return int(os.environ["RANK"]), total_1


def environment_without_group() -> tuple[bool, str, str]:
    return torch.distributed.is_initialized(), os.environ["WORLD_SIZE"], os.environ["DS_ACCELERATOR"]


def rank_one_raises() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("only rank one says this")
    torch.distributed.barrier()


def rank_zero_is_killed() -> None:
    if torch.distributed.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def rank_one_hangs_here() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(600)


def returns_what_cannot_travel() -> object:
    return lambda: None


@pytest.fixture(autouse=True)
def nothing_left_behind() -> object:
    yield
    assert multiprocessing.active_children() == []


def test_values_come_back_in_the_order_of_the_ranks() -> None:
    (first, total_1), (second, same_1) = run_distributed(sum_of_ranks, 2, 10)
    assert (first, second) == (0, 1)
    assert total_1.item() == same_1.item() == 10.0


def test_without_a_backend_there_is_no_group() -> None:
    assert run_distributed(environment_without_group, 1, backend=None) == [(False, "1", "cpu")]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"(?s)^rank 1 of 2 raised.*rank_one_raises.*only rank one says this"):
        run_distributed(rank_one_raises, 2)
    assert time.monotonic() - started < 60


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(DistributedError, match=r"rank 0 of 2 died before it returned: killed by SIGKILL|rank 1 of 2 raised"):
        run_distributed(rank_zero_is_killed, 2)


def test_a_rank_that_hangs_is_named_with_the_place() -> None:
    with pytest.raises(DistributedError, match=r"(?s)not done after 15 s: rank 1 of 2\n.*rank_one_hangs_here"):
        run_distributed(rank_one_hangs_here, 2, timeout=15)


def test_a_result_that_does_not_pickle_says_so() -> None:
    with pytest.raises(DistributedError, match="pickle"):
        run_distributed(returns_what_cannot_travel, 1, backend=None)


def test_no_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size = 0: at least one process is needed"):
        run_distributed(sum_of_ranks, 0, 1)
