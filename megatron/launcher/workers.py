"""The processes of a run, as children of the one that waits for them: no death can be missed, and the first one is known.

A thread waits for each worker. What it sees, and the signals that arrive, are events of one queue, in the order in which they happened.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from megatron.config.failures import FOLDER, first_failure
from megatron.launcher.deaths import Ended, note_end

IMPATIENCE_S = 2.0  # a Ctrl-C this long after the first one means: now
GRACE_S = 2.0  # the others may say what they have to say for so long after the first failure; then they get SIGTERM
PATIENCE_S = 15.0  # a worker that is still there this long after the first failure waits in compiled code, and does not hear SIGTERM
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Command(NamedTuple):
    """What a worker runs. The environment holds its RANK."""

    argv: Sequence[str]
    env: Mapping[str, str]


def run_workers(commands: Sequence[Command]) -> int:
    """Runs the commands and returns the exit status of the first that failed (128 + n if signal n ended it); 0 if none did.

    SIGINT and SIGTERM go to every worker, once, and this waits for as long as they need to save. A second Ctrl-C kills them. If this process dies,
    the kernel sends SIGTERM to each. A signal that this process was started to ignore stays ignored.

    After the first failure the others have GRACE_S to end by themselves, then get SIGTERM, and after PATIENCE_S SIGKILL. At the end, standard error
    gets the first traceback once more, and which worker was ended by which signal of somebody else's.
    """
    workers = Workers()
    with tempfile.TemporaryDirectory(prefix="failures_") as folder:
        workers.run([command._replace(env={**command.env, FOLDER: folder}) for command in commands])
        if workers.stopped_by is None:
            say_what_failed(Path(folder), workers.failed)
    return workers.status()


def run_under_another(command: Command) -> int:
    """Runs one worker for a launcher that others wrote, and notes in the folder that FOLDER names how it failed. Returns its exit status.

    If this process is killed, the worker is killed too: such a launcher kills what has not ended in time.
    """
    workers = Workers(signal.SIGKILL)
    workers.run([command])
    if workers.failed is not None and (folder := command.env.get(FOLDER)):
        note_end(Path(folder), workers.failed)
    return workers.status()


def say_what_failed(folder: Path, failed: Ended | None) -> None:
    """On standard error: the first traceback of the run, if there is one, and the signal that ended a worker, if one did."""
    sentences = (first_failure(folder), failed.sentence() if failed is not None else None)
    sys.stderr.write("".join(f"{sentence}\n" for sentence in sentences if sentence is not None))


class Events:
    """What happens, in order, for one reader. Threads and signal handlers may put events at any moment; a pipe wakes the reader."""

    def __init__(self) -> None:
        self._events: deque[Ended | int] = deque()
        self._read, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)

    def put(self, event: Ended | int) -> None:
        """Adds an event."""
        self._events.append(event)
        with suppress(BlockingIOError):  # a full pipe wakes the reader too
            os.write(self.wakeup, b"e")

    def get(self, timeout: float | None) -> Ended | int | None:
        """The next event; None if nothing happens for `timeout` seconds (None: waits for ever)."""
        while not self._events:
            if not select.select([self._read], [], [], timeout)[0]:
                return None
            os.read(self._read, 4096)
        return self._events.popleft()


class Workers:
    """Workers that run, and what has happened to them. Only `hear` may be called by a signal handler."""

    def __init__(self, without_parent: signal.Signals = signal.SIGTERM) -> None:
        self._without_parent = without_parent
        self.failed: Ended | None = None
        """The first that failed; one that SIGKILL ended before any other, because that signal comes from outside. None: none has failed."""
        self.stopped_by: int | None = None
        """The first signal that arrived. None: none has."""
        self._all_well = True
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        """By process id."""
        self._groups: list[int] = []
        self._events = Events()
        self._deadlines: list[tuple[float, int]] = []
        """When the workers that still run get which signal; the next one first."""
        self._stopped_at = 0.0

    def run(self, commands: Sequence[Command]) -> None:
        """Starts them and waits until all have ended. What they have started and left behind gets SIGTERM."""
        try:
            with signals_to(self.hear, self._events.wakeup):
                for command in commands:
                    self._start(command)
                while self._running:
                    self._wait_for_event()
        finally:
            for group in self._groups:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGTERM)

    def _start(self, command: Command) -> None:
        process = start_in_session(command.argv, command.env, self._without_parent)
        self._running[process.pid] = process
        self._groups.append(process.pid)
        threading.Thread(target=self._wait_for, args=(command.env["RANK"], process), daemon=True).start()

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """A signal has arrived."""
        self._events.put(number)

    def status(self) -> int:
        if self.failed is not None:
            return self.failed.shell_status
        return 0 if self._all_well or self.stopped_by is None else 128 + self.stopped_by

    def _wait_for(self, rank: str, process: subprocess.Popen[bytes]) -> None:
        self._events.put(Ended(rank, process.pid, process.wait()))

    def _wait_for_event(self) -> None:
        """Acts on the next event, or on the next deadline."""
        event = self._events.get(max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None)
        if event is None:
            self._send(self._deadlines.pop(0)[1])
            return
        if isinstance(event, Ended):
            self._note(event)
        else:
            self._pass_on(event)

    def _note(self, ended: Ended) -> None:
        del self._running[ended.pid]
        self._all_well &= ended.status == 0
        as_told = self.stopped_by is not None and ended.shell_status == 128 + self.stopped_by
        if ended.status == 0 or as_told:
            return
        if self.failed is None:
            now = time.monotonic()
            told = self.stopped_by is not None  # they have had their signal, and are saving
            self._deadlines = [] if told else [(now + GRACE_S, signal.SIGTERM)]
            self._deadlines.append((now + PATIENCE_S, signal.SIGKILL))
        before_ours = len(self._deadlines) > 1  # nothing was sent yet
        if self.failed is None or (ended.status == -signal.SIGKILL and before_ours and self.failed.status > 0):
            self.failed = ended

    def _pass_on(self, number: int) -> None:
        if self.stopped_by is None:
            self.stopped_by, self._stopped_at = number, time.monotonic()
            self._send(number)
        elif number == signal.SIGINT and time.monotonic() - self._stopped_at > IMPATIENCE_S:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        """To the workers; SIGKILL also to what they have started."""
        for process in self._running.values():
            if number == signal.SIGKILL:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
            else:
                process.send_signal(number)


@contextmanager
def signals_to(handler: signal._HANDLER, wakeup: int = -1) -> Iterator[None]:
    """SIGINT and SIGTERM call the handler; one that is ignored stays ignored.

    `wakeup`: a pipe that a signal writes to at once. The kernel may give a signal to another thread, and a handler waits until the main thread runs.
    Without the pipe, the main thread could stay in a call for ever. -1: no pipe.
    """
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    earlier_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        signal.set_wakeup_fd(earlier_wakeup)


def start_in_session(argv: Sequence[str], env: Mapping[str, str], without_parent: signal.Signals = signal.SIGTERM) -> subprocess.Popen[bytes]:
    """A process that the terminal's signals do not reach. On Linux the kernel sends it `without_parent` when this process dies."""
    import ctypes  # not above: a run of one process starts nothing, but imports this module

    # The C library is looked up before the fork: there are threads, and a lock that one of them holds would stay locked in the child.
    at_fork = partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, without_parent) if sys.platform == "linux" else None
    return subprocess.Popen(list(argv), env=dict(env), start_new_session=True, preexec_fn=at_fork)
