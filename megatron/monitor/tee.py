"""Copies of standard output and standard error in files."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from megatron.config import disk


class Copy:
    """A text file that is written line by line until the disk refuses. Then `failures` gets a sentence, and nothing more is written."""

    def __init__(self, path: Path, failures: list[str]) -> None:
        self.path = path
        self.failures = failures
        self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._failed = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def close(self) -> None:
        """Closes the file. Text that is still in memory and does not fit on the disk is lost."""
        self._attempt(self._file.flush)
        with suppress(OSError):
            self._file.close()

    def _attempt(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except OSError as error:
            self._failed = True
            self.failures.append(f"{disk.sentence(error, self.path)}.")


class Tee:
    """Writes to a file and to a stream. All other attributes (whether it is a terminal, its encoding, ...) are those of the stream."""

    def __init__(self, stream: TextIO, copy: Copy) -> None:
        self.stream = stream
        self.copy = copy

    def write(self, text: str) -> int:
        self.copy.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.copy.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def copied_streams(directory: str | None, *, rank: int) -> Iterator[list[str]]:
    """Until the end of the block, this process's standard output and standard error are also written to files in `directory` (None: they are not).

    The files are named by host and rank. New text is appended, so a run that goes on keeps the earlier text. An exception that ends the block is
    written
    to the second file. The list gets a sentence for each file that the disk refuses.
    """
    failures: list[str] = []
    if directory is None:
        yield failures
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    names = {name: Path(directory) / f"{socket.gethostname()}_rank_{rank:02d}_{name}.txt" for name in ("stdout", "stderr")}
    with ExitStack() as files:
        copies = {name: files.enter_context(closing(Copy(path, failures))) for name, path in names.items()}
        copies["stdout"].write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank}, process {os.getpid()} on {socket.gethostname()} ----\n")
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Tee(before[0], copies["stdout"]), Tee(before[1], copies["stderr"])
        try:
            yield failures
        except BaseException:
            copies["stderr"].write(traceback.format_exc())
            raise
        finally:
            sys.stdout, sys.stderr = before


def still_copied(now: TextIO, before: TextIO) -> TextIO:
    """`now` with the copy of `before`. Use it when you replace a stream that is copied."""
    return Tee(now, before.copy) if isinstance(before, Tee) and now is not before else now  # type: ignore[return-value]
