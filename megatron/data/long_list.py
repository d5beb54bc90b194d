"""A list of numbers that may be too long for memory: an index of a hundred million documents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

KEPT_BYTES = 1 << 23


class LongList:
    """Numbers of one type, added at the end and read from the beginning. At most KEPT_BYTES of them are in memory. The rest is in a file without a
    name in `folder`, which the system deletes when the process ends for any reason.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder, self._dtype = folder, dtype
        self._kept = bytearray()
        self._file: IO[bytes] | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, number: int) -> None:
        self.extend([number])

    def extend(self, numbers: np.ndarray | Sequence[int]) -> None:
        """Raises the system's OSError when the disk is full."""
        self._length += len(numbers)
        self._kept += np.asarray(numbers).astype(self._dtype).tobytes()
        if len(self._kept) >= KEPT_BYTES:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # `close` closes it
            self._file.write(self._kept)
            self._kept.clear()

    def pieces(self) -> Iterator[np.ndarray]:
        """All numbers in order, some at a time. Nothing may be added meanwhile."""
        if self._file is not None:
            self._file.seek(0)
            while piece := self._file.read(KEPT_BYTES):
                yield np.frombuffer(piece, self._dtype)
        if self._kept:
            yield np.frombuffer(bytes(self._kept), self._dtype)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
