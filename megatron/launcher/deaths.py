"""Which worker process died first, and of what: DeepSpeed's launcher says neither."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CAUSES = {
    signal.SIGKILL: "probably the machine had no memory left (look in `dmesg` or in the container's log): use fewer processes, a smaller micro-batch "
    "or a higher ZeRO stage",
    signal.SIGSEGV: "a fault in compiled code",
    signal.SIGBUS: "a fault in compiled code, or a full /dev/shm",
    signal.SIGABRT: "a fault in compiled code; its own message is above",
    signal.SIGILL: "the processor cannot run this compiled code",
}


class Death(NamedTuple):
    """A worker that a signal ended."""

    rank: str
    pid: int
    number: int

    def __str__(self) -> str:
        known = next((known for known in signal.Signals if known == self.number), None)  # most real-time signals have no name
        cause, name = (
            CAUSES.get(known or signal.SIGTERM, "another process or a person sent it"),
            known.name if known is not None else "a real-time signal",
        )
        return f"Process {self.rank} (pid {self.pid}) was ended by signal {self.number}, {name}: {cause}. The other processes were stopped."


class Deaths:
    """Looks at the workers again and again; `first` is the first one that a signal ended. Without /proc it sees nothing.

    `find`: the workers' process ids; `expected`: how many there will be.
    """

    def __init__(self, find: Callable[[], list[int]], expected: int) -> None:
        self.find = find
        self.expected = expected
        self.first: Death | None = None
        self._ended: float | None = None
        """When the first worker was seen that has failed. None: there is none."""
        self._ranks: dict[int, str] = {}

    def look(self) -> None:
        """Call it more often than the launcher asks for its dead children, which are gone afterwards."""
        if self._ended is not None:
            return
        if len(self._ranks) < self.expected:
            self._ranks |= {pid: rank for pid in self.find() if (rank := rank_of(pid)) is not None}
        ended = {pid: status for pid in self._ranks if (status := status_of_dead(pid)) is not None}
        killed = [Death(self._ranks[pid], pid, os.WTERMSIG(status)) for pid, status in ended.items() if os.WIFSIGNALED(status)]
        if any(ended.values()):  # what happens to the others afterwards is the launcher's doing
            self._ended = time.monotonic()
        self.first = next(iter(killed), None)

    @property
    def seconds_ago(self) -> float:
        """The time since the first failure; 0 before it."""
        return 0.0 if self._ended is None else time.monotonic() - self._ended


def rank_of(pid: int) -> str | None:
    """RANK in a process's environment; None when it has none, or has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry.removeprefix(b"RANK=").decode() for entry in entries if entry.startswith(b"RANK=")), None)


def status_of_dead(pid: int) -> int | None:
    """What `wait` will give for a process that has ended and was not asked for yet; None for one that runs, or is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None  # the last field of proc(5)'s stat is exit_code
