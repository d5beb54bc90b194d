"""Locks for files that one process at a time writes. If the process dies for any reason, the system frees its locks.

They are record locks (`lockf`) and not `flock`, because a worker process that outlives its killed parent does not keep record locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron.config import disk

HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
NO_LOCKS_ON_THIS_DISK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def lock(file: IO[bytes]) -> None:
    """Locks a file that is open for writing. Does nothing on disks without locks, such as those of some clusters.

    Raises BlockingIOError when another process holds it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_BY_ANOTHER:
            raise BlockingIOError(error.errno, "another process is writing it", file.name) from None
        if error.errno not in NO_LOCKS_ON_THIS_DISK:
            raise


def open_locked(path: Path) -> IO[bytes]:
    """Opens `path`, empty and locked. A file that a killed process left under this name is emptied. Raises BlockingIOError."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        try:
            lock(file)
            if is_at(file, path):
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # between opening and locking its writer gave it its final name, or removed it


def is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Adds this folder to disk errors that do not name a place, such as those of a full disk. Libraries' own exceptions for them become OSErrors."""
    try:
        yield
    except Exception as error:
        number = disk.number(error)
        if number is None:
            raise
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(folder)
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error
