"""Work on batches in several processes. Results come in order, the number of unfinished batches is bounded, and a process that dies gives a
sentence."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Note = TypeVar("Note")
BatchIn = TypeVar("BatchIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

AHEAD = 2
"""Unfinished batches for each process: one in work, one waiting."""
THREADS = "TOKENIZERS_PARALLELISM"
SECONDS_TO_END = 5.0


class WorkerError(RuntimeError):
    """A worker process ended in the middle of its work, or failed with an error that cannot be sent back."""


class Task(Protocol[BatchIn, ResultOut]):
    """The work to do: a small object that can be pickled. `start` is called once in every process and loads what the work needs."""

    def start(self) -> Callable[[BatchIn], ResultOut]: ...


def map_in_order(task: Task[Batch, Result], batches: Iterable[tuple[Batch, Note]], workers: int) -> Generator[tuple[Result, Note]]:
    """The result of each batch with the note that came with it, in order. One worker is this process; more are processes of their own with one
    thread each.

    An exception of the work is raised here. Raises WorkerError when a process dies. Closing the generator ends the processes.
    """
    if workers == 1:
        with single_threaded():
            work = task.start()
            for batch, note in batches:
                yield work(batch), note
        return
    with Workers(task, workers) as pool:
        waiting: deque[tuple[Future[Result], Note]] = deque()
        for batch, note in batches:
            waiting.append((pool.submit(batch), note))
            if len(waiting) > AHEAD * workers:
                future, first = waiting.popleft()
                yield future.result(), first
        while waiting:
            future, first = waiting.popleft()
            yield future.result(), first


@contextmanager
def single_threaded() -> Iterator[None]:
    """The `tokenizers` library reads this variable at every call."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(THREADS)
        if before is not None:
            os.environ[THREADS] = before


class Failure(NamedTuple):
    """What a process sends back instead of a result."""

    error: Exception


class Workers(Generic[Batch, Result]):
    """Processes that each hold a started task. One thread of this process waits for each of them, so the two sides never block each other."""

    def __init__(self, task: Task[Batch, Result], count: int) -> None:
        self._task = task
        self._count = count
        self._idle: queue.SimpleQueue[tuple[Connection, BaseProcess]] = queue.SimpleQueue()
        self._started: list[tuple[Connection, BaseProcess]] = []

    def __enter__(self) -> Workers[Batch, Result]:
        spawn = multiprocessing.get_context("spawn")  # threads do not survive a fork, and there are some
        for _ in range(self._count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(self._task, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end shows here
            self._started.append((ours, process))
            self._idle.put((ours, process))
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="worker")
        return self

    def submit(self, batch: Batch) -> Future[Result]:
        return self._threads.submit(self._work, batch)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            for _, process in self._started:
                process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for connection, process in self._started:
            connection.close()
            process.join(SECONDS_TO_END)

    def _work(self, batch: Batch) -> Result:
        connection, process = self._idle.get()
        try:
            connection.send(batch)
            reply = connection.recv()
        except (EOFError, OSError):
            raise WorkerError(obituary(process)) from None
        finally:
            self._idle.put((connection, process))
        if isinstance(reply, Failure):
            raise reply.error
        result: Result = reply
        return result


def obituary(process: BaseProcess) -> str:
    process.join(SECONDS_TO_END)
    code = process.exitcode
    if code is not None and code < 0:
        ended = f"was ended by {signal.Signals(-code).name}" + (" (the system does that when memory runs out)" if code == -signal.SIGKILL else "")
    else:
        ended = f"ended with status {code}"
    return (
        f"a worker process {ended}; nothing was written. Fewer --workers need less memory. "
        "If your own script starts several workers, it must do so under `if __name__ == '__main__':`"
    )


def serve(task: Task[Batch, Result], connection: Connection) -> None:
    """The loop of a worker process. It ends when the other side of the connection ends, for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ[THREADS] = "false"
    work: Callable[[Batch], Result] | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            reply: Result | Failure
            try:
                work = work or task.start()
                reply = work(batch)
            except Exception as error:
                reply = Failure(portable(error))
            connection.send(reply)


def portable(error: Exception) -> Exception:
    """The error itself if it can be sent to the other process, else an error with its traceback as text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkerError("".join(traceback.format_exception(error)))
    return error
