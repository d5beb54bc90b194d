"""Threads that read units into slots while the model computes. Reads that are waited for go before those that may be needed."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable

Work = Callable[[], None]
NOW, SOON, END = 0, 1, 2


class Job:
    """One read."""

    def __init__(self, work: Work) -> None:
        self._work, self._lock = work, threading.Lock()
        self._taken, self._done = False, threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Does the work, once."""
        with self._lock:
            if self._taken:
                return
            self._taken = True
        try:
            self._work()
        except Exception as error:  # it belongs to the thread that waits
            self._error = error
        finally:
            self._done.set()

    def drop(self) -> bool:
        """Takes the work away where it has not begun; whether that was so."""
        with self._lock:
            if self._taken:
                return False
            self._taken = True
        self._done.set()
        return True

    def wait(self) -> None:
        """Until the work is done. Raises its error."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._done.is_set()


class Reader:
    """A queue and its threads, which start with the first read and end with the process or with `close`."""

    def __init__(self, threads: int = 2) -> None:
        self._queue: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._count, self._threads = threads, list[threading.Thread]()

    def submit(self, work: Work, *, urgent: bool) -> Job:
        """Puts work into the queue."""
        job = Job(work)
        self._put(NOW if urgent else SOON, job)
        return job

    def hurry(self, job: Job) -> None:
        """The job is waited for now."""
        if not job.is_done:
            self._put(NOW, job)

    def close(self) -> None:
        """Ends the threads after what is in the queue."""
        for _ in self._threads:
            self._queue.put((END, next(self._numbers), None))
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _put(self, priority: int, job: Job) -> None:
        self._queue.put((priority, next(self._numbers), job))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._serve, name="expert reader", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self) -> None:
        while (job := self._queue.get()[2]) is not None:
            job.run()
