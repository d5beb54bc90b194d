"""Which worker process failed, and of what. Its parent knows: `megatron.launcher.workers`."""

from __future__ import annotations

import json
import signal
import time
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


class Ended(NamedTuple):
    """A worker that has ended. `status`: as subprocess gives it, -n for signal n."""

    rank: str
    pid: int
    status: int

    @property
    def shell_status(self) -> int:
        return 128 - self.status if self.status < 0 else self.status

    def sentence(self) -> str | None:
        """Which signal ended it, and what that usually means. None: no signal did."""
        if self.status >= 0:
            return None
        number = -self.status
        known = next((known for known in signal.Signals if known == number), None)  # most real-time signals have no name
        cause = CAUSES.get(known or signal.SIGTERM, "another process or a person sent it")
        name = known.name if known is not None else "a real-time signal"
        return f"Process {self.rank} (pid {self.pid}) was ended by signal {number}, {name}: {cause}. The other processes were stopped."


def note_end(folder: Path, ended: Ended) -> None:
    """For a launcher further up, which is not the parent of the worker."""
    file = folder / f"{ended.pid}.ended"
    file.with_suffix(".part").write_text(json.dumps([time.time(), *ended]))
    file.with_suffix(".part").rename(file)


def noted_end(folder: Path) -> Ended | None:
    """The worker that failed first; one that SIGKILL ended before any other, because that signal comes from outside. None: none has failed."""
    notes = [json.loads(file.read_text()) for file in folder.glob("*.ended")]
    ended = sorted((status != -signal.SIGKILL, moment, Ended(rank, pid, status)) for moment, rank, pid, status in notes)
    return ended[0][-1] if ended else None
