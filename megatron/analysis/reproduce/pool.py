"""Runs side by side, each in a process of its own that starts with the packages already imported."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Protocol as Interface

from megatron.analysis.reproduce.one_run import in_a_process
from megatron.analysis.reproduce.runs import CONFIG, LOG, RECORD, Place, Run, read_record, record_of

PRELOADED = ["deepspeed", "matplotlib.pyplot", "torch._dynamo", "megatron.analysis.reproduce.one_run"]
"""Imported once, by the process that all runs are copies of."""
SECONDS_TO_STOP = 120.0


class Reporter(Interface):
    """Who is told how far the runs are."""

    def done(self, run: Run, seconds: float) -> None: ...

    def failed(self, run: Run, sentence: str) -> None: ...


@dataclass
class Pool:
    """Runs what is not done yet, `jobs` at a time."""

    place: Place
    jobs: int
    reporter: Reporter
    failures: list[str] = field(default_factory=list)
    """A sentence for each run that failed."""
    _running: dict[int, Started] = field(default_factory=dict)

    def finish(self, runs: Sequence[Run]) -> None:
        """Returns when all of them are done or have failed. A failed run does not stop the others.

        Raises KeyboardInterrupt on Ctrl-C and SIGTERM, when every run has saved a checkpoint and ended.
        """
        left = [run for run in runs if record_of(run, self.place) is None]
        with ended_by_a_signal():
            try:
                while left or self._running:
                    while left and len(self._running) < self.jobs:
                        self._start(left.pop(0))
                    ready = wait(list(self._running), timeout=5)
                    for sentinel in ready:
                        self._end(self._running.pop(sentinel))  # type: ignore[arg-type]
            except BaseException:
                self._stop()
                raise

    def _start(self, run: Run) -> None:
        folder = self.place.folder(run)
        forget_another_protocol(run, folder)
        process = context().Process(target=in_a_process, args=(run, folder), name=run.name)
        process.start()
        self._running[process.sentinel] = Started(run, process)

    def _end(self, started: Started) -> None:
        started.process.join()
        run = started.run
        if record_of(run, self.place) is not None:
            self.reporter.done(run, time.monotonic() - started.at)
            return
        status = started.process.exitcode or 0
        how = f"was killed by signal {-status}" if status < 0 else "did not finish"
        log = self.place.folder(run) / LOG
        self.failures.append(f"The run {run.name} {how}: {last_sentence(log)} Its log: {log}")
        self.reporter.failed(run, self.failures[-1])

    def _stop(self) -> None:
        """Asks every run to save and end, waits, and kills what does not end in time."""
        for started in self._running.values():
            if started.process.is_alive() and started.process.pid is not None:
                os.kill(started.process.pid, signal.SIGINT)
        until = time.monotonic() + SECONDS_TO_STOP
        for started in self._running.values():
            started.process.join(max(0.0, until - time.monotonic()))
            if started.process.is_alive():
                started.process.kill()
                started.process.join()
        self._running.clear()


@dataclass
class Started:
    """A run and its process."""

    run: Run
    process: ForkServerProcess
    at: float = field(default_factory=time.monotonic)


def forget_another_protocol(run: Run, folder: Path) -> None:
    """Deletes what a run with other settings left in this folder."""
    config, record = folder / CONFIG, read_record(folder / RECORD)
    mark = folder / "fingerprint"
    known = mark.read_text() if mark.is_file() else None
    if folder.exists() and (known != run.fingerprint or (record is not None and record["fingerprint"] != run.fingerprint)):
        for name in (config, folder / RECORD, mark, folder / LOG):
            name.unlink(missing_ok=True)
        shutil.rmtree(folder / "save", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(run.fingerprint)


def last_sentence(log: Path) -> str:
    """The last line that says something. What follows a traceback is its last line, too."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip(" -\t")]
    except OSError:
        lines = []
    last = lines[-1] if lines else "it said nothing."
    return last if last.endswith((".", "!")) else f"{last}."


def context() -> multiprocessing.context.ForkServerContext:
    """Processes that are copies of one that has imported everything. One thread each; the cores are shared by runs, not by threads."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", DS_ACCELERATOR="cpu")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


@contextmanager
def ended_by_a_signal() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Callable[[int, FrameType | None], object] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
