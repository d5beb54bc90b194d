"""One run per directory, also after the one before was killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.checkpoint import lock
from megatron.checkpoint.errors import RunLockError
from megatron.checkpoint.lock import RunLock

HOLDER = """
import os, sys, time
from megatron.checkpoint.lock import RunLock
with RunLock(sys.argv[1]):
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path, repository: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run that holds the lock, and the worker it forked, which outlives it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=repository)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    yield process, worker
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_dies(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, _ = holder
    with (
        pytest.raises(RunLockError, match=rf"{tmp_path} is in use by another run \(process {process.pid} on .*, started 2.*set `save` to another"),
        RunLock(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_worker_forked_in_the_last_moment_lets_go_a_little_later(tmp_path: Path) -> None:
    late = _held_by(tmp_path, pid=_gone())
    threading.Timer(0.3, os.close, [late]).start()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_worker_that_never_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    late = _held_by(tmp_path, pid=_gone())
    with pytest.raises(RunLockError, match="in use by another run"), RunLock(tmp_path):
        pass
    os.close(late)


@pytest.mark.parametrize("facts", [{}, {"host": "elsewhere", "pid": 2**22 + 1}, {"pid": "1"}, {"pid": 0}, {"pid": -1}, {"pid": 10**30}])
def test_a_holder_that_may_live_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, object]) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    held = _held_by(tmp_path, **facts)
    with pytest.raises(RunLockError, match="in use by another run"), RunLock(tmp_path):
        pass
    os.close(held)


def _held_by(directory: Path, **facts: object) -> int:
    """A handle that has the lock in the name of this process, or of the one that `facts` describe."""
    file = directory / ".lock"
    file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "then", **facts}))
    handle = os.open(file, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "new" / "run"):
            pass


def test_an_unknown_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("?")
        with pytest.raises(RunLockError, match=r"in use by another run \(another process\)"), RunLock(tmp_path):
            pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLockError, match=r"Cannot write into .*Not a directory"), RunLock(tmp_path / "file" / "run"):
        pass


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(RunLockError, match=r"Cannot lock .*No locks available. Set `save` to a directory on a disk that has free space"),
        RunLock(tmp_path),
    ):
        pass
