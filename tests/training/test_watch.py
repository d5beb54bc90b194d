"""A run of several processes in which one dies, fails or never enters a collective operation ends soon, and says who it was."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.testing.distributed import run_distributed
from megatron.training.watch.place import ELSEWHERE, FIRST_STEP, STEP, Account, Group, Observer, Place
from megatron.training.watch.verdict import hangs, listed, summary
from megatron.training.watch.watcher import HANG_STATUS
from tests.training.ranks import ended, started
from tests.training.runs import run_values

LIMIT_S = 3.0


def values(corpus: Path, save: Path | None = None, **keys: Any) -> dict[str, Any]:
    own = {"plugins": ["tests.training.trouble"], "collective_timeout_s": LIMIT_S, "zero_optimization": {"stage": 1}, "eval_iters": 0}
    return run_values(corpus, save, **{"train_iters": 12, "train_micro_batch_size_per_gpu": 1, **own, **keys})


def place(rank: int, still_s: float, phase: str = STEP, operation: str | None = "all_reduce") -> Place:
    return Place(rank, 5, phase, still_s, operation, "megatron/x.py:3, in f", pid=100 + rank, host="node")


@pytest.mark.parametrize(
    ("places", "verdict"),
    [
        ([place(0, 9), place(1, 0)], True),
        ([place(0, 7), place(1, 7)], False),
        ([place(0, 9), place(1, 0, ELSEWHERE)], False),
        ([place(0, 9), place(1, 0, FIRST_STEP)], False),
        ([place(0, 9), place(1, 8, ELSEWHERE)], True),
        ([place(0, 9, ELSEWHERE), place(1, 9, ELSEWHERE)], True),
        ([], False),
    ],
    ids=["waiting in a step", "not long enough", "the other saves", "the other compiles", "nobody moves", "nobody moves while saving", "nobody"],
)
def test_when_a_run_hangs(places: list[Place], verdict: bool) -> None:
    assert hangs(places, 8.0) == verdict


def test_who_entered_what() -> None:
    pair, four = (2, 3), (0, 1, 2, 3)
    there, waits = Group(four, 7, ()), Group(pair, 3, ("all_to_all([4])",))
    accounts = {
        0: Account(place(0, 9), {"0": Group(four, 8, ("all_reduce([4])",))}, ""),
        1: Account(place(1, 0, operation=None), {"0": there}, ""),
        2: Account(place(2, 9), {"0": there, "1": waits}, ""),
    }
    lines = list(summary({rank: place(rank, 9) for rank in range(4)}, accounts, 8.0))
    assert lines == [
        "The run hangs in step 6: processes have waited for 8 s and more (collective_timeout_s).",
        "all_reduce([4]), operation 8 among all processes: entered by 0; never entered by 1, 2; never entered, as far as is known, by 3.",
        "all_to_all([4]), operation 3 among the processes 2, 3: entered by 2; never entered, as far as is known, by 3.",
        "Processes 0, 2 are in all_reduce: megatron/x.py:3, in f.",
        "Process 1 is in no collective operation: megatron/x.py:3, in f.",
        "Process 3 (node, pid 103) does not answer: it is stopped, or compiled code in it does not return. "
        "It was last seen at megatron/x.py:3, in f.",
    ]
    assert listed([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"


@pytest.mark.parametrize(("work", "moves"), [("sleep", False), ("compute", True), ("write", True)])
def test_what_moving_is(work: str, moves: bool, tmp_path: Path) -> None:
    """The observer looks from another thread at this one, which does one thing for a while."""
    places: list[Place] = []

    def watch() -> None:
        observer = Observer(0, counts_cpu=True)
        for _ in range(4):
            time.sleep(0.15)
            places.append(observer.look())

    (thread := threading.Thread(target=watch)).start()
    with (tmp_path / "file").open("wb", buffering=0) as file:
        while thread.is_alive():  # however long the four looks take
            if work == "compute":
                torch.ones(256, 256) @ torch.ones(256, 256)
            elif work == "write":
                file.write(b"x")
                time.sleep(0.05)
            else:
                time.sleep(0.7)
    thread.join()
    still = places[-1].still_s
    assert still < 0.1 if moves else still > 0.3
    assert (places[-1].phase, places[-1].operation) == (ELSEWHERE, None)
    assert places[-1].line.startswith("training/test_watch.py:")


def look_at_a_waiting_process() -> tuple[str | None, tuple[int, ...], int, tuple[str, ...]] | None:
    """Process 0 waits in an operation that process 1 enters later: what its observer says meanwhile."""
    from megatron.training.watch.place import groups_of

    torch.distributed.all_reduce(torch.ones(3))
    found: list[tuple[str | None, Group]] = []

    def watch() -> None:
        time.sleep(0.5)
        found.append((Observer(0, counts_cpu=True).look().operation, groups_of(0)["0"]))

    if os.environ["RANK"] == "1":
        time.sleep(1.5)
        torch.distributed.broadcast(torch.ones(2, 5), 1)
        return None
    (thread := threading.Thread(target=watch)).start()
    torch.distributed.broadcast(torch.ones(2, 5), 1)
    thread.join()
    ((operation, group),) = found
    return operation, group.members, group.entered, group.pending


def test_the_operation_of_a_waiting_process() -> None:
    assert run_distributed(look_at_a_waiting_process, 2)[0] == ("broadcast", (0, 1), 2, ("broadcast([2, 5])",))


def test_a_process_that_never_enters_is_named_with_all_stacks(corpus: Path, tmp_path: Path) -> None:
    with started(values(corpus), tmp_path, 3, TROUBLE="sleep:1:5:60") as ranks:
        (first, *others) = ended(ranks, within=60)
    assert [status for status, _ in (first, *others)] == [HANG_STATUS] * 3
    report = first[1]
    stacks, _, verdict = report.partition("---- The run hangs ----\n")
    assert [f"---- Process {rank} (" in stacks for rank in range(3)] == [True] * 3
    assert "in get_into\n    time.sleep(" in stacks, "the stack of the process that others wait for"
    lines = verdict.splitlines()
    assert lines[0] == "The run hangs in step 5: processes have waited for 3 s and more (collective_timeout_s)."
    assert lines[1].startswith("all_reduce([")
    assert lines[1].endswith("among all processes: entered by 0, 2; never entered by 1.")
    assert lines[3].startswith("Process 1 is in no collective operation: training/trouble.py:")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "rank", "said"),
    [
        ("sleep:0:5:60", 0, "entered by 1, 2; never entered by 0."),
        ("compute:2:5:60", 0, "entered by 0, 1; never entered by 2."),
        ("stop:1:5:60", 0, "entered by 0, 2; never entered, as far as is known, by 1."),
        ("stop:0:5:60", 2, "Process 0 (127.0.0.1) has said nothing for"),
        ("saving-sleep:1:1:60", 0, "Process 1 is in no collective operation: training/trouble.py:"),
    ],
)
def test_every_process_and_every_way_to_hang(corpus: Path, tmp_path: Path, trouble: str, rank: int, said: str) -> None:
    with started(values(corpus, tmp_path / "save", checkpoint_factor=3), tmp_path, 3, TROUBLE=trouble) as ranks:
        stopped = int(trouble.split(":")[1]) if trouble.startswith("stop") else None  # is for its launcher to kill
        results = {number: ended([process], within=60)[0] for number, process in enumerate(ranks) if number != stopped}
    assert {status for status, _ in results.values()} == {HANG_STATUS}
    assert said in results[rank][1]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["compute:1:1:8", "saving-compute:0:1:8"], ids=["first step", "saving"])
def test_work_outside_of_steps_may_take_long(corpus: Path, tmp_path: Path, trouble: str) -> None:
    with started(values(corpus, tmp_path / "save", train_iters=4, collective_timeout_s=2), tmp_path, 2, TROUBLE=trouble) as ranks:
        assert [status for status, _ in ended(ranks, within=90)] == [0, 0]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_fails_speaks_last(corpus: Path, tmp_path: Path, rank: int) -> None:
    with started(values(corpus), tmp_path, 2, TROUBLE=f"raise:{rank}:5:0") as ranks:
        results = ended(ranks, within=60)
        times = [process.outputs[1].stat().st_mtime_ns for process in ranks]
    assert [status for status, _ in results] == [1, 1]
    assert results[rank][1].rstrip().endswith("ZeroDivisionError: a bug in one process")
    other = results[1 - rank][1]
    assert "Traceback" not in other
    assert other.count("\n") == 1
    assert f"Stopping, because process {rank} (" in other
    assert "failed with ZeroDivisionError: a bug in one process." in other
    assert times[rank] > times[1 - rank]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_that_is_killed_is_named_by_the_others(corpus: Path, tmp_path: Path, rank: int) -> None:
    with started(values(corpus), tmp_path, 3, TROUBLE=f"kill:{rank}:5:0") as ranks:
        results = ended(ranks, within=60)
    assert [status for status, _ in results] == [-signal.SIGKILL if number == rank else 1 for number in range(3)]
    for number in {0, 1, 2} - {rank}:
        assert f"Stopping, because process {rank} (" in results[number][1]
        assert "is gone without a word" in results[number][1]
        assert "Traceback" not in results[number][1]
