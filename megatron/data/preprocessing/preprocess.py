"""The work of tools/datasets/preprocess_data*.py: files of documents become `PREFIX_{name}_document.bin/.idx`. All files are written, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron.data.indexed import DatasetError, IndexedDatasetWriter
from megatron.data.input.bad_input import BadInput, OnError, OnProblem, Problem
from megatron.data.input.contents import Format
from megatron.data.input.input_files import find_files
from megatron.data.input.reading import Meter, Record, read_records, text_of
from megatron.data.preprocessing.encode import Column, Encoded, TextTask, batches
from megatron.data.preprocessing.workers import Task, map_in_order
from megatron.data.progress import Reporter, Stage
from megatron.data.staging import publish_files, staging_folder
from megatron.data.tokenizer import TokenizerError
from megatron.data.tokenizer.lost import Losses


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """The options that the three commands share; see their --help. `num_docs` None: the number of documents is not known."""

    inputs: tuple[str, ...]
    keys: tuple[str, ...]
    output_prefix: str
    workers: int = 1
    num_docs: int | None = None
    log_interval: int = 100
    on_error: OnError = "fail"
    input_format: Format = "auto"


class Output(NamedTuple):
    """One pair of files. `dtype` None: plain numbers, kept as int32 when all of them are whole, else as float32. `counts`: its tokens are text."""

    name: str
    dtype: np.dtype[Any] | None
    counts: bool = True


class Job(Protocol):
    """Makes columns from records. `outputs` are the columns' files, in order. `keys` are the keys that it reads of a record."""

    keys: tuple[str, ...]
    outputs: tuple[Output, ...]
    task: Task[Any, Encoded]

    def payload(self, record: Record, on_problem: OnProblem) -> tuple[Any, int] | None:
        """The part of a record that the task gets, and its bytes of text. A record that cannot be used is reported and gives None."""


class Item(NamedTuple):
    origin: str
    payload: Any
    size: int


@dataclass
class Summary:
    """What was written. `left_out`: lines about input that could not be used."""

    prefixes: list[Path] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    left_out: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [*(f"{prefix}.bin and .idx" for prefix in self.prefixes), f"{self.documents:,} documents, {self.tokens:,} tokens", *self.left_out]


@dataclass(frozen=True)
class TextJob:
    """Writes the text under each key to an output of that name. With `task.mask_before`, the labels of the only key go to `label`."""

    keys: tuple[str, ...]
    outputs: tuple[Output, ...]
    task: TextTask

    def payload(self, record: Record, on_problem: OnProblem) -> tuple[Any, int] | None:
        texts = [text_of(record, key, on_problem) for key in self.keys]
        if any(text is None for text in texts):
            return None
        return tuple(texts), sum(len(text.encode()) for text in texts if text is not None)


def text_job(task: TextTask, keys: tuple[str, ...]) -> TextJob:
    """Raises TokenizerError or DatasetError for keys and tokens that cannot be used."""
    tokenizer = task.load()
    dtype = task.dtype(tokenizer)
    outputs = [Output(key, dtype) for key in keys]
    if task.mask_before:
        if len(keys) != 1 or "label" in keys:
            raise DatasetError(
                f"--jsonl-keys {' '.join(keys)}: masking needs exactly one key. The key must not be 'label', because the labels are written "
                "under that name"
            )
        if max(task.mask_before) >= tokenizer.vocab_size:
            raise TokenizerError(
                f"--mask-before-token: {max(task.mask_before)} is not an id of this tokenizer; its ids are 0..{tokenizer.vocab_size - 1:,}"
            )
        outputs.append(Output("label", dtype, counts=False))
    return TextJob(keys, tuple(outputs), task)


def preprocess(job: Job, options: PreprocessOptions, reporter: Reporter) -> Summary:
    """Raises DatasetError, TokenizerError or WorkerError with a sentence for the user; then nothing was written."""
    check(options)
    bad_input, losses = BadInput(options.on_error), Losses(options.on_error)
    files = find_files(options.inputs, bad_input)
    meter, prefix, summary = Meter.of(files), Path(options.output_prefix), Summary()
    total = (meter.total or None) if options.num_docs is None else options.num_docs
    records = (record for path in files for record in read_records(path, bad_input, job.keys, meter, form=options.input_format))
    items = read_items(job, records, bad_input)
    noted = ((([item.payload for item in batch]), (batch, meter.done)) for batch in batches(items, lambda item: item.size))
    encoding = map_in_order(job.task, noted, options.workers)
    with staging_folder(prefix) as folder:
        with closing(encoding), ExitStack() as stack, reporter.stage("tokenising", total) as stage:
            writers = [open_output(stack, folder / f"{prefix.name}_{output.name}_document", output) for output in job.outputs]
            progress = Progress(stage, meter, options)
            for encoded, (batch, position) in encoding:
                for row, pieces in encoded.lost:
                    losses.note(batch[row].origin, pieces)
                for row, kind, what in encoded.unusable:
                    bad_input(Problem(kind, batch[row].origin, what))
                for writer, column in zip(writers, encoded.columns, strict=True):
                    writer.add_column(column.tokens_T, column.sizes_N[column.sizes_N > 0])
                tokens = sum(len(column.tokens_T) for output, column in zip(job.outputs, encoded.columns, strict=True) if output.counts)
                summary.documents += len(batch) - len(encoded.unusable)
                summary.tokens += tokens
                progress.advance(batch, tokens, position)
            progress.show()
            if not summary.documents:
                none = "the tokenizer has no token for any of the text in the input" if losses.documents else "no text in the input"
                raise DatasetError("\n".join([none, *losses.summary(), *bad_input.summary()]))
        summary.prefixes = [Path(f"{prefix}_{output.name}_document") for output in job.outputs]
        summary.left_out = [*losses.summary(), *bad_input.summary()]
        publish_files(folder, prefix.parent)
    return summary


def check(options: PreprocessOptions) -> None:
    for flag, value in (("--workers", options.workers), ("--log-interval", options.log_interval), ("--num-docs", options.num_docs)):
        if value is not None and value < 1:
            raise DatasetError(f"{flag} {value}: give 1 or more")
    if len(set(options.keys)) < len(options.keys):
        raise DatasetError(f"--jsonl-keys {' '.join(options.keys)}: the same key is given twice")
    if any("/" in key for key in options.keys):
        raise DatasetError(f"--jsonl-keys {' '.join(options.keys)}: a key is part of a file's name, so it cannot have a slash in it")
    if Path(options.output_prefix).name in ("", "..") or options.output_prefix.endswith("/"):
        raise DatasetError(f"--output-prefix {options.output_prefix!r}: give the start of a file name, such as data/mine")


def read_items(job: Job, records: Iterable[Record], on_problem: OnProblem) -> Iterator[Item]:
    for record in records:
        payload = job.payload(record, on_problem)
        if payload is not None:
            yield Item(record.origin, *payload)


class Progress:
    """Updates the progress display every `log_interval` documents."""

    def __init__(self, stage: Stage, meter: Meter, options: PreprocessOptions) -> None:
        self._stage, self._meter, self._options = stage, meter, options
        self._done = self._documents = self._tokens = self._bytes = self._position = 0

    def advance(self, batch: list[Item], tokens: int, position: int) -> None:
        self._done += len(batch)
        self._documents += len(batch)
        self._tokens += tokens
        self._bytes += sum(item.size for item in batch)
        self._position = min(position, self._meter.total)
        if self._documents >= self._options.log_interval:
            self.show()

    def show(self) -> None:
        position = self._position if self._options.num_docs is None else min(self._done, self._options.num_docs)
        self._stage.advance(self._bytes, documents=self._documents, tokens=self._tokens, position=position)
        self._documents = self._tokens = self._bytes = 0


class NumbersWriter:
    """Writes a pair of plain numbers. Their type is known only when all are there, so the pair is written when the context ends without an error."""

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        self._columns: list[Column] = []

    def __enter__(self) -> NumbersWriter:
        return self

    def add_column(self, values_T: np.ndarray, sizes_N: np.ndarray) -> None:
        self._columns.append(Column(values_T, sizes_N))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._columns:
            return
        values_T = np.concatenate([column.tokens_T for column in self._columns])
        limits = np.iinfo(np.int32)
        whole = bool((values_T == np.rint(values_T)).all() and limits.min <= values_T.min(initial=0) and values_T.max(initial=0) <= limits.max)
        dtype = np.dtype("<i4" if whole else "<f4")
        with IndexedDatasetWriter(self._prefix, dtype) as writer:
            writer.add_column(values_T.astype(dtype), np.concatenate([column.sizes_N for column in self._columns]))


def open_output(stack: ExitStack, prefix: Path, output: Output) -> IndexedDatasetWriter | NumbersWriter:
    if output.dtype is None:
        return stack.enter_context(NumbersWriter(prefix))
    return stack.enter_context(IndexedDatasetWriter(prefix, output.dtype))
