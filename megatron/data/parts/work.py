"""Makes parts in several processes: each takes a whole file, reads and tokenises it and writes its part. Nothing but counts passes between processes,
so the work scales with the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.indexed import DatasetError, IndexedDatasetWriter
from megatron.data.input.bad_input import BadInput, OnError
from megatron.data.input.contents import Format
from megatron.data.input.reading import Document, Meter, read_documents
from megatron.data.parts.record import InputFile, Record, digest_of, record_path, write_record
from megatron.data.preprocessing.encode import Encoded, TextTask, batches
from megatron.data.preprocessing.workers import SECONDS_TO_END, THREADS, WorkerError, obituary, portable, single_threaded
from megatron.data.tokenizer.lost import Losses


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """What every part is made with. `settings` is its digest."""

    text: TextTask
    dtype: np.dtype[Any]
    settings: str
    jsonl_key: str
    on_error: OnError
    input_format: Format
    limits: dict[str, int]


class Job(NamedTuple):
    file: InputFile
    prefix: Path


class Counts(NamedTuple):
    """What came in since the last message, and how much of the file is read, in bytes on the disk."""

    bytes: int
    documents: int
    tokens: int
    position: int


Tell = Callable[[Counts], None]
Encode = Callable[[list[tuple[str, ...]]], Encoded]


def make_part(task: PartTask, encode: Encode, job: Job, tell: Tell) -> Record:
    """Raises DatasetError; then there is no record and no part."""
    started, modified = time.monotonic(), job.file.path.stat().st_mtime_ns
    record_path(job.prefix).unlink(missing_ok=True)
    bad_input, losses, meter = BadInput(task.on_error), Losses(task.on_error), Meter.of([job.file.path])
    totals, before, left = dict.fromkeys(("documents", "tokens", "text_bytes"), 0), 0, False
    documents = read_documents(job.file.path, task.jsonl_key, bad_input, meter, form=task.input_format)
    writer = IndexedDatasetWriter(job.prefix, task.dtype)
    with writer, closing(documents):  # type: ignore[type-var]
        for batch in batches(documents, lambda document: len(document.text)):
            new = write_batch(writer, encode([(document.text,) for document in batch]), batch, losses)
            for name, count in new.items():
                totals[name] += count
            tell(Counts(new["text_bytes"], new["documents"], new["tokens"], meter.done - before))
            before = meter.done
            if any(totals[name] >= limit for name, limit in task.limits.items()):
                left = True
                break
    given = digest_of(job.file.path)
    if job.file.sha256 not in (None, given):
        raise DatasetError(
            f"{job.file.path} is damaged: its checksum is not the one that the hub states. Remove the file; it is then downloaded again"
        )
    if job.file.path.stat().st_mtime_ns != modified:
        raise DatasetError(f"{job.file.path} was written while it was read. Wait until it is complete, then give the same command again")
    tokens, index = Path(f"{job.prefix}.bin"), Path(f"{job.prefix}.idx")
    record = Record(
        settings=task.settings,
        name=job.file.name,
        size=job.file.size,
        modified=modified,
        input_sha256=given,
        documents=totals["documents"],
        tokens=totals["tokens"],
        text_bytes=totals["text_bytes"],
        limits=task.limits if left else {},
        left_out={str(kind): count for kind, count in bad_input.counts.items()},
        notes=[*losses.summary(), *bad_input.summary()],
        bin_bytes=tokens.stat().st_size,
        idx_bytes=index.stat().st_size,
        bin_sha256=digest_of(tokens),
        idx_sha256=digest_of(index),
        seconds=time.monotonic() - started,
    )
    write_record(job.prefix, record)
    return record


def write_batch(writer: IndexedDatasetWriter, encoded: Encoded, batch: list[Document], losses: Losses) -> dict[str, int]:
    """Counts of what was written. A text without tokens is left out."""
    (column,) = encoded.columns
    for row, pieces in encoded.lost:
        losses.note(batch[row].origin, pieces)
    writer.add_column(column.tokens_T, column.sizes_N[column.sizes_N > 0])
    kept = [document for document, size in zip(batch, column.sizes_N, strict=True) if size]
    return {"documents": len(kept), "tokens": len(column.tokens_T), "text_bytes": sum(len(document.text.encode()) for document in kept)}


class Done(NamedTuple):
    """A job has ended. `record` None: another process is writing this part."""

    job: Job
    record: Record | None


class Pool:
    """Processes that make parts; one worker is this process. `run` gives them jobs as they become free."""

    def __init__(self, task: PartTask, workers: int) -> None:
        self._task, self._workers = task, workers
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Job] = {}
        self._processes: dict[Connection, BaseProcess] = {}

    def run(self, next_job: Callable[[], Job | None], tell: Tell) -> Iterator[Done]:
        """Yields every job that has ended. `next_job` is asked again after each of them; None: there is nothing to do now.

        Raises what a job raised, and WorkerError when a process dies. The other processes are stopped then.
        """
        if self._workers == 1:
            yield from self._run_here(next_job, tell)
            return
        while True:
            while len(self._busy) < self._workers and (job := next_job()) is not None:
                connection = self._idle.pop() if self._idle else self._start()
                connection.send(job)
                self._busy[connection] = job
            if not self._busy:
                return
            for ready in wait(list(self._busy)):
                assert isinstance(ready, Connection)
                answer = self._receive(ready)
                if isinstance(answer, Counts):
                    tell(answer)
                    continue
                job = self._busy.pop(ready)
                self._idle.append(ready)
                if isinstance(answer, Exception):
                    raise answer
                yield Done(job, answer)

    def _run_here(self, next_job: Callable[[], Job | None], tell: Tell) -> Iterator[Done]:
        with single_threaded():
            encode = self._task.text.start()
            while (job := next_job()) is not None:
                try:
                    yield Done(job, make_part(self._task, encode, job, tell))
                except DatasetError as error:
                    if not is_taken(error):
                        raise
                    yield Done(job, None)

    @property
    def is_busy(self) -> bool:
        return bool(self._busy)

    def _receive(self, connection: Connection) -> Counts | Record | Exception | None:
        try:
            answer: Counts | Record | Exception | None = connection.recv()
        except (EOFError, OSError):
            raise WorkerError(obituary(self._processes[connection])) from None
        return answer

    def _start(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(self._task, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def stop(self) -> None:
        for connection, process in self._processes.items():
            if connection in self._busy:
                process.terminate()
            connection.close()
            process.join(SECONDS_TO_END)


@contextmanager
def pool(task: PartTask, workers: int) -> Iterator[Pool]:
    made = Pool(task, workers)
    try:
        yield made
    finally:
        made.stop()


def serve(task: PartTask, connection: Connection) -> None:
    """The loop of a process. It ends when the other side of the connection ends, for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ[THREADS] = "false"
    encode: Encode | None = None
    with suppress(EOFError, OSError):
        while True:
            job = connection.recv()
            answer: Record | Exception | None
            try:
                encode = encode or task.text.start()
                answer = make_part(task, encode, job, connection.send)
            except BrokenPipeError:
                return
            except Exception as error:
                answer = None if is_taken(error) else portable(error)
            connection.send(answer)


def is_taken(error: Exception) -> bool:
    """Whether another process is writing the part."""
    return isinstance(error, DatasetError) and str(error).startswith("another process is writing")
