"""Reads a metrics.jsonl that a run is writing: each time only what is new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

REMEMBERED = 64
"""Bytes before the place that was reached. If they have changed, the file is another one."""
BLOCK = 1 << 22
LARGEST_STEP = 1 << 53


class Replaced(Exception):
    """The file is no longer the one that was read: a resumed or new run has written it anew. Read it from the beginning."""


class MetricsFile:
    """The records of a file, as they come. A last line without its end is left for the next time; a line that is no record is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restart()

    def restart(self) -> None:
        """Goes back to the beginning of the file."""
        self._place = 0
        self._identity: tuple[int, int] | None = None
        self._tail = b""

    def new_records(self) -> Iterator[dict[str, Any]]:
        """What was added since the last call; nothing if there is no such file (yet). Raises Replaced, and OSError if the file cannot be read."""
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            if self._identity is not None:
                self.restart()
                raise Replaced from None
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity not in (None, identity) or status.st_size < self._place or not self._continues(file):
                self.restart()
                raise Replaced
            self._identity = identity
            yield from self._read(file)

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self._place - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _read(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        unfinished = b""
        while block := file.read(BLOCK):
            *lines, unfinished = (unfinished + block).split(b"\n")
            for line in lines:
                self._place += len(line) + 1
                if (record := parsed(line)) is not None:
                    yield record
            if lines:
                self._tail = (self._tail + b"\n".join([*lines, b""]))[-REMEMBERED:]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl. None: it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("iteration") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < LARGEST_STEP else None
