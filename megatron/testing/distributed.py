"""Run one function on several processes of this machine, as a launcher would: for tests, and for trying things out.

    def total(factor: int) -> float:
        x = torch.ones(1) * torch.distributed.get_rank() * factor
        torch.distributed.all_reduce(x)
        return x.item()

    assert run_distributed(total, 2, 10) == [10.0, 10.0]

The parent keeps the store where the processes meet. The system chooses its port, so two runs never use the same one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# After the first failure the others are given this long to say what happened to them: the first report need not be the cause.
GRACE_SECONDS = 0.5


class DistributedError(RuntimeError):
    """A rank raised an exception, died or hung. The message names the rank and holds its traceback."""


@dataclass(frozen=True)
class Outcome:
    """The result of a rank: its pickled value, or the text of its traceback (then `failed`). `moment` orders failures across ranks."""

    failed: bool
    moment: float
    payload: bytes


@dataclass(frozen=True)
class Rank:
    """A started process, the end of the pipe it reports through, and the file its stack is written to when it hangs."""

    number: int
    process: BaseProcess
    connection: Connection
    stack_file: Path


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, backend: str | None = "gloo", timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `world_size` fresh processes and return what they returned, in the order of the ranks.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set and has joined a `torch.distributed` group
    of `backend` (None: no group is made). `function` has to be importable (defined at the top of a module); it, its arguments and its result have
    to pickle. Raises DistributedError when a rank raises, dies, or is not done after `timeout` seconds; no rank outlives the call.

    The processes are copies of one that has done nothing but to import what `multiprocessing.set_forkserver_preload` was given, which saves them
    these imports. The first call starts it, and it ends with this process. (With nccl each process starts from nothing: CUDA and the choice of the
    accelerator do not survive the copying.)
    """
    if world_size < 1:
        raise ValueError(f"world_size = {world_size}: at least one process is needed")
    task = pickle.dumps((function, args))
    with (
        tempfile.TemporaryDirectory(prefix="run_distributed_") as folder,
        _store(timeout) as port,
        _started(world_size, task, backend, port, Path(folder)) as ranks,
    ):
        outcomes = _collect(ranks, deadline=time.monotonic() + timeout)
        _raise_failures(ranks, outcomes, timeout)
        return [pickle.loads(outcomes[rank.number].payload) for rank in ranks]


@contextlib.contextmanager
def _store(timeout: float) -> Iterator[int]:
    """Serve the store that the processes meet at; gives its port."""
    from torch.distributed import TCPStore

    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    yield store.port
    del store


@contextlib.contextmanager
def _started(world_size: int, task: bytes, backend: str | None, port: int, folder: Path) -> Iterator[list[Rank]]:
    """Start the processes; on the way out kill those still running."""
    context = _context(backend)
    ranks: list[Rank] = []
    try:
        for number in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            stack_file = folder / f"rank{number}.txt"
            environment = _environment(number, world_size, backend, port)
            process = context.Process(target=_run_rank, args=(task, backend, environment, sender, stack_file), name=f"rank{number}")
            process.start()
            sender.close()
            ranks.append(Rank(number, process, receiver, stack_file))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.connection.close()


def _context(backend: str | None) -> ForkServerContext | SpawnContext:
    """How processes are started."""
    if backend == "nccl" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    threads, path = os.environ.get("OMP_NUM_THREADS", "1"), os.pathsep.join(sys.path)
    with _variables(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=threads, PYTHONPATH=path):  # DeepSpeed and OpenMP look once, when they are loaded
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Sets environment variables for a while."""
    given = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(given)


def _environment(rank: int, world_size: int, backend: str | None, port: int) -> dict[str, str]:
    values = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        # As under torchrun: the store is there already, rank 0 is not to open another one at its port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if backend != "nccl":
        values["DS_ACCELERATOR"] = "cpu"
        if sys.platform == "linux":
            values["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return values


# ---------------------------------------------------------------- in the process of a rank


def _run_rank(task: bytes, backend: str | None, environment: dict[str, str], sender: Connection, stack_file: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    _follow_parent()
    with stack_file.open("w") as stack:
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            outcome = Outcome(failed=False, moment=time.monotonic(), payload=_call(task, backend))
        except BaseException:
            outcome = Outcome(failed=True, moment=time.monotonic(), payload=traceback.format_exc().encode())
        sender.send(outcome)


def _call(task: bytes, backend: str | None) -> bytes:
    import torch.distributed as dist

    function, args = pickle.loads(task)
    if backend is not None:
        dist.init_process_group(backend)
    result = pickle.dumps(function(*args))
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _follow_parent() -> None:
    """End this process when its parent is gone, killed runs of tests included."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


# ---------------------------------------------------------------- in the parent


def _collect(ranks: list[Rank], deadline: float) -> dict[int, Outcome]:
    """Wait for every rank's outcome; shortly after the first failure, or at the deadline, stop waiting. A rank that died or hangs has none."""
    outcomes: dict[int, Outcome] = {}
    waiting = {rank.connection: rank for rank in ranks}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), timeout=left):
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            with contextlib.suppress(EOFError, ConnectionError):
                outcomes[rank.number] = rank.connection.recv()
            if rank.number not in outcomes or outcomes[rank.number].failed:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def _raise_failures(ranks: list[Rank], outcomes: dict[int, Outcome], timeout: float) -> None:
    """Raise what went wrong first; nothing where every rank returned."""
    failures = sorted((outcome.moment, number) for number, outcome in outcomes.items() if outcome.failed)
    if failures:
        number = failures[0][1]
        others = f" (ranks that failed after it: {', '.join(str(n) for _, n in failures[1:])})" if failures[1:] else ""
        raise DistributedError(f"rank {number} of {len(ranks)} raised{others}:\n{outcomes[number].payload.decode()}")
    silent = [rank for rank in ranks if rank.number not in outcomes]
    for rank in silent:
        rank.process.join(timeout=GRACE_SECONDS)
        if rank.process.exitcode is not None:
            raise DistributedError(f"rank {rank.number} of {len(ranks)} died before it returned: {_ending(rank.process.exitcode)}")
    if silent:
        names = ", ".join(str(rank.number) for rank in silent)
        raise DistributedError(f"not done after {timeout:g} s: rank {names} of {len(ranks)}\n" + "\n".join(_stack(rank) for rank in silent))


def _ending(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"


def _stack(rank: Rank) -> str:
    """Where a hanging rank is, as its own interpreter writes it on SIGUSR1."""
    if hasattr(signal, "SIGUSR1") and rank.process.pid is not None:
        os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(GRACE_SECONDS)
    return f"rank {rank.number} is at\n{rank.stack_file.read_text()}"
