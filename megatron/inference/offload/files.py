"""Reading parts of files past the page cache, so that slow memory is as slow as it is, and noticing that a file is not what it was.

A file is opened with O_DIRECT where its disk allows it; else what was read is dropped from the page cache at once (posix_fadvise).
O_DIRECT moves whole blocks to memory that begins at a block: other parts go through an aligned buffer of the reading thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron.config.disk import explained
from megatron.inference.offload.errors import OffloadError

BLOCK = 4096
"""Bytes: what O_DIRECT reads begins and ends at multiples of this."""
_BUFFERS = threading.local()


class WatchedFile:
    """A file that is read in parts while it must not change. Raises OffloadError."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        """`direct` False: the page cache is used."""
        self.path, self.bypasses_cache = path, direct
        self.descriptor, self.is_direct = _open(path, direct=direct)
        self._identity = _identity(os.fstat(self.descriptor))
        self.size = os.fstat(self.descriptor).st_size

    def check(self) -> None:
        """That it is still the file that was opened, as long and unchanged."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError as error:
            raise OffloadError(f"{self.path} was removed while the model was running. Restore the file and start again.") from error
        except OSError as error:
            raise OffloadError(f"{self.path} cannot be read: {explained(error, self.path)}.") from error
        if now.st_size < self.size:
            raise OffloadError(f"{self.path} was cut short while the model was running ({self.size:,} to {now.st_size:,} bytes). Start again.")
        if _identity(now) != self._identity:
            raise OffloadError(f"{self.path} was changed while the model was running. Start again, so that all experts are of one model.")

    def read(self, offset: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `offset` on."""
        self.check()
        length = len(target)
        if offset + length > self.size:
            raise OffloadError(f"{self.path} has {self.size:,} bytes, but {offset + length:,} are needed. It was cut short: copy or write it again.")
        if self.is_direct and (offset % BLOCK or length % BLOCK or _address(target) % BLOCK):
            begin, end = offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK
            buffer = aligned_buffer(end - begin)
            self._fill(begin, buffer, at_least=offset + length - begin)
            target[:] = buffer[offset - begin : offset - begin + length]
            return
        self._fill(offset, target, at_least=length)
        if self.bypasses_cache and not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def _fill(self, offset: int, target: memoryview, *, at_least: int) -> None:
        done = 0
        while done < at_least:
            try:
                count = os.preadv(self.descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise OffloadError(f"{self.path} cannot be read at byte {offset + done:,}: {explained(error, self.path)}.") from error
            if count == 0:
                raise OffloadError(f"{self.path} was cut short while it was read (at byte {offset + done:,}). Restore the file and start again.")
            done += count

    def close(self) -> None:
        """Gives the descriptor back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class WatchedFiles:
    """The files of a store, opened once each."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct, self._opened = direct, dict[Path, WatchedFile]()

    def at(self, path: Path) -> WatchedFile:
        """The opened file. Raises OffloadError."""
        if path not in self._opened:
            self._opened[path] = WatchedFile(path, direct=self._direct)
        return self._opened[path]

    @property
    def opened(self) -> Mapping[Path, WatchedFile]:
        """Those that were asked for so far."""
        return self._opened


def private_memory(length: int) -> mmap.mmap:
    """Memory that begins at a page and is taken from the system as it is written to. Pages of a shared map would not be given back."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def aligned_buffer(length: int) -> memoryview:
    """At least `length` bytes of this thread, which begin at a block. The next call takes them back."""
    buffer: mmap.mmap | None = getattr(_BUFFERS, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = private_memory(max(length, BLOCK))
        _BUFFERS.buffer = buffer
    return memoryview(buffer)[: -(-length // BLOCK) * BLOCK]


def _open(path: Path, *, direct: bool) -> tuple[int, bool]:
    """(descriptor, whether it reads past the page cache)."""
    if direct and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # a disk without O_DIRECT refuses to open or to read
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(descriptor, [aligned_buffer(BLOCK)[:BLOCK]], 0)
                return descriptor, True
            except OSError:
                os.close(descriptor)
    try:
        return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise OffloadError(f"{path} cannot be opened: {explained(error, path)}.") from error


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])
