"""The downloaded part of a corpus, kept as JSON lines. It grows when a later command asks for more.

A download that was stopped for any reason continues where the last complete part ends. So does a later download that asks for more.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import OnProblem
from megatron.data.input.reading import Document, Record, read_documents, text_of
from megatron.data.locking import open_locked

PART_BYTES = 64 << 20
STATE, LOCK = "state.json", "lock"
COMPRESSION = 3


class Stream(Protocol):
    """A corpus that can be read from its beginning or from a `position` that it gave earlier."""

    def records(self) -> Iterator[Record]: ...

    def position(self) -> Any:
        """Where the records read so far end, as JSON."""

    def go_to(self, position: Any) -> None:
        """Records come from there on."""


class Store:
    """`folder` holds the downloaded part of `source` (JSON that describes the corpus). `open_stream` uses the network; it is called only when more
    is needed."""

    def __init__(self, folder: Path, source: Any, open_stream: Callable[[], Stream], key: str) -> None:
        self.folder = folder
        self.source = json.loads(json.dumps(source))
        self._open_stream = open_stream
        self._key = key

    def restart(self) -> None:
        """Deletes what was downloaded, after a check that the network works. Raises DatasetError if it does not."""
        self._open_stream()
        for path in (*self.folder.glob("part-*"), *self.folder.glob(f"{STATE}*"), self.folder / LOCK):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in there: it may be somebody's
            self.folder.rmdir()

    def documents(self, on_problem: OnProblem) -> Generator[Document]:
        """All documents: first those in the folder, then new ones, which are downloaded and kept. Close it when enough is read. Raises
        DatasetError."""
        state = self._read_state()
        for part in state["parts"]:
            yield from read_documents(self.folder / part["name"], self._key, on_problem)
        if not state["complete"]:
            yield from self._fetch(state, on_problem)

    def _read_state(self) -> dict[str, Any]:
        path = self.folder / STATE
        if not path.is_file():
            return {"source": self.source, "parts": [], "position": None, "passed": 0, "complete": False}
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            whole = all((self.folder / part["name"]).stat().st_size == part["size"] for part in state["parts"])
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            whole = False
        if not whole:
            raise DatasetError(
                f"{self.folder} is damaged: a part is missing or cut short; remove the folder, or fetch it again with --force-redownload"
            )
        if state["source"] != self.source:
            raise DatasetError(
                f"{self.folder} holds {state['source']}, not {self.source}; --force-redownload replaces it, and another directory (-d) keeps both"
            )
        return state

    def _fetch(self, state: dict[str, Any], on_problem: OnProblem) -> Generator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = open_locked(self.folder / LOCK)
        except BlockingIOError:
            raise DatasetError(f"another process is fetching into {self.folder} right now; wait for it or choose another directory (-d)") from None
        with held:
            known = {part["name"] for part in state["parts"]}
            for path in self.folder.glob("part-*"):
                if path.name not in known:
                    path.unlink()  # a killed run's
            stream = self._open_stream()
            records = resume(stream, state)
            while not state["complete"]:
                yield from Part(self.folder, state, stream).fill(records, self._key, on_problem)


def resume(stream: Stream, state: dict[str, Any]) -> Iterator[Record]:
    """The stream's records that are not in the parts yet."""
    if state["position"] is not None:
        stream.go_to(state["position"])
    records = stream.records()
    for _ in range(state["passed"]):
        next(records, None)
    return records


class Part:
    """The part that is being written. It gets its name, and a line in the state, when it is full or when reading ends for any reason but a kill."""

    def __init__(self, folder: Path, state: dict[str, Any], stream: Stream) -> None:
        self._folder, self._state, self._stream = folder, state, stream
        self._name = f"part-{len(state['parts']):05d}.jsonl.gz"
        self._bytes = self._documents = 0
        self._sound = True  # until the disk refuses a piece of it

    def fill(self, records: Iterator[Record], key: str, on_problem: OnProblem) -> Generator[Document]:
        """Documents as they are written; ends when the part is full or, with state['complete'], when there are no more."""
        partial = self._folder / f"{self._name}.partial"
        try:
            with partial.open("wb") as raw:
                file = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=COMPRESSION, mtime=0)
                try:
                    yield from self._write(file, records, key, on_problem)
                finally:
                    if self._sound:
                        file.close()
                        self._seal(raw, partial)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: gzip.GzipFile, records: Iterator[Record], key: str, on_problem: OnProblem) -> Generator[Document]:
        for record in records:
            text = text_of(record, key, on_problem)
            self._state["passed"] += 1  # what stopped the work with an error is met again by the next run
            if text is None:
                continue
            line = json.dumps({key: text}, ensure_ascii=False).encode()
            self._sound = False
            file.write(line + b"\n")
            self._sound = True
            self._documents += 1
            self._bytes += len(line)
            yield Document(record.origin, text)
            if self._bytes >= PART_BYTES:
                self._state.update(position=self._stream.position(), passed=0)
                return
        self._state["complete"] = True

    def _seal(self, raw: IO[bytes], partial: Path) -> None:
        raw.flush()
        os.fsync(raw.fileno())
        if self._documents:
            self._state["parts"].append({"name": self._name, "size": raw.tell(), "documents": self._documents})
        temporary = self._folder / f"{STATE}.partial"
        try:
            temporary.write_text(json.dumps(self._state))
            if self._documents:
                os.replace(partial, self._folder / self._name)
            os.replace(temporary, self._folder / STATE)
        finally:
            temporary.unlink(missing_ok=True)
