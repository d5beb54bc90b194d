"""One run per directory: a file lock that the system frees when its holder dies, however it dies.

It is `flock` and no record lock as in `data/locking.py`: a record lock keeps no second run of the same process out, and it is lost as soon as this
process closes any handle of the file. The price is that a forked worker has a handle, too, until it closes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType

from megatron.checkpoint import layout
from megatron.checkpoint.errors import RunLockError
from megatron.config import disk
from megatron.data.folders import broken_link

PATIENCE = 5.0
"""Seconds that a lock may outlive its holder: a worker forked in the last moment has not closed its handle yet."""


class RunLock:
    """Context manager that holds <directory>/.lock. Raises RunLockError, naming the holder, when another run has it."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        file = self.directory / layout.LOCK
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            why = broken_link(self.directory) or disk.sentence(error, self.directory)
            raise RunLockError(f"Cannot write into {self.directory}: {why}. Set `save` to a directory that you may write to.") from error
        try:
            _lock(descriptor)
            self._write_holder(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise RunLockError(self._refusal(error, holder)) from error
        self._descriptor = descriptor
        _close_in_children(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self.forget()

    def forget(self) -> None:
        """Closes this process's handle; the lock is free when no process has one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_holder(self, descriptor: int) -> None:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)

    def _refusal(self, error: OSError, holder: bytes) -> str:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            why = disk.explained(error, self.directory)
            return (
                f"Cannot lock {self.directory / layout.LOCK}: {why}. Set `save` to a directory on a disk that has free space and supports file locks."
            )
        facts = _facts(holder)
        who = f"process {facts['pid']} on {facts['host']}, started {facts['started']}" if facts else "another process"
        return f"{self.directory} is in use by another run ({who}). Wait for it to end or stop it, or set `save` to another directory."


def _lock(descriptor: int) -> None:
    """Locks the file at once, or within PATIENCE where its holder is dead. Raises OSError."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > last or not _dead(_facts(os.pread(descriptor, 4096, 0))):
                raise
            time.sleep(0.02)


def _facts(holder: bytes) -> dict[str, object] | None:
    """What the holder wrote about itself; None where that is not readable."""
    try:
        facts = json.loads(holder)
        return {name: facts[name] for name in ("pid", "host", "started")}
    except (ValueError, KeyError, TypeError):
        return None


def _dead(facts: dict[str, object] | None) -> bool:
    """True where the holder was a process of this machine and is none any more."""
    if facts is None or facts["host"] != socket.gethostname() or not isinstance(facts["pid"], int) or facts["pid"] < 1:
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _close_in_children(lock: RunLock) -> None:
    """A forked data-loading worker that outlives a killed run must not keep its lock."""
    reference = weakref.ref(lock)

    def close() -> None:
        held = reference()
        if held is not None:
            held.forget()

    os.register_at_fork(after_in_child=close)
