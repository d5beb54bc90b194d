"""Writes a corpus that another program has tokenised as a `.bin/.idx` pair, then compares the pair with the source, token for token.

Shapes: T tokens, N items and D documents of one batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.formats.borders import Split
from megatron.data.formats.datatrove import DatatroveSource
from megatron.data.formats.litdata import LitdataSource
from megatron.data.formats.llm_c import LlmCSource
from megatron.data.formats.mds import MdsSource
from megatron.data.formats.megatron_core import MegatronSource
from megatron.data.formats.olmo import OlmoSource
from megatron.data.formats.source import Documents, ReadOptions, TokenSource
from megatron.data.indexed import DatasetError, IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron.data.preprocessing.encode import IGNORED
from megatron.data.progress import Reporter

FORMATS: dict[str, Callable[[Sequence[str], ReadOptions], TokenSource]] = {
    "datatrove": DatatroveSource,
    "olmo": OlmoSource,
    "mds": MdsSource,
    "litdata": LitdataSource,
    "megatron": MegatronSource,
    "llm.c": LlmCSource,
}
BORDERS = ("file", "eod", "bod")
"""Where documents end: as the files say; after each end-of-document token; before each of them."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """`eod`: the end-of-document token; None: it is not known. `borders` None: as the files say; for llm.c, bod."""

    format: str
    inputs: tuple[str, ...]
    output_prefix: str
    vocab_size: int
    eod: int | None = None
    borders: str | None = None
    append_eod: bool = False
    check: bool = True
    dtype: np.dtype[Any] | None = None
    column: str | None = None


class Imported(NamedTuple):
    prefixes: tuple[Path, ...]
    documents: int
    tokens: int
    notes: tuple[str, ...]


class Written(NamedTuple):
    """A batch as the pair stores it."""

    tokens_T: np.ndarray
    sizes_N: np.ndarray
    ends_D: np.ndarray
    labels_T: np.ndarray | None

    @property
    def columns(self) -> list[np.ndarray]:
        return [self.tokens_T, *([] if self.labels_T is None else [self.labels_T])]


def import_tokens(options: ImportOptions, reporter: Reporter) -> Imported:
    """Writes PREFIX.bin and .idx, and PREFIX_label.bin and .idx if the source says which tokens are learned. All are written, or none.

    Raises DatasetError: files that are missing, cut short or not of this format; no borders of documents; ids that the vocabulary does not have; a
    difference between the source and the pair.
    """
    prefix = Path(options.output_prefix)
    if prefix.name in ("", ".."):
        raise DatasetError(f"--output-prefix {options.output_prefix!r} is not the name of a pair; give a path such as data/mine")
    if not prefix.parent.is_dir():
        raise DatasetError(f"--output-prefix {options.output_prefix}: there is no folder {prefix.parent}; make it or choose another one")
    if options.append_eod and options.eod is None:
        raise DatasetError("--append-eod needs the id of the end-of-document token; give --eod ID or the tokenizer (-t, -v)")
    if options.eod is not None and not 0 <= options.eod < options.vocab_size:
        raise DatasetError(f"--eod {options.eod}: the vocabulary has {options.vocab_size:,} ids; give one of 0..{options.vocab_size - 1:,}")
    source = open_source(options)
    refuse_own_files(options, prefix)
    dtype = np.dtype("<i4") if source.has_loss else token_dtype(options.vocab_size)
    prefixes = (prefix, *([Path(f"{prefix}_label")] if source.has_loss else []))
    documents = tokens = 0
    with ExitStack() as stack, reporter.stage("importing", source.tokens or None) as stage:
        writers = [stack.enter_context(IndexedDatasetWriter(path, dtype)) for path in prefixes]
        for batch in as_written(source, options, dtype):
            for writer, values_T in zip(writers, batch.columns, strict=True):
                writer.add_column(values_T, batch.sizes_N, ends=batch.ends_D)
            documents, tokens = documents + len(batch.ends_D), tokens + len(batch.tokens_T)
            stage.advance(batch.tokens_T.nbytes, len(batch.ends_D), len(batch.tokens_T), position=tokens)
        if not tokens:
            raise DatasetError(f"no tokens in {', '.join(options.inputs)}")
    if options.check:
        check_written(prefixes, as_written(source, options, dtype), reporter, tokens)
    checked = [f"checked: all {tokens:,} tokens and {documents:,} documents are those of the source"] if options.check else []
    return Imported(prefixes, documents, tokens, (*source.notes, *checked))


def open_source(options: ImportOptions) -> TokenSource:
    """The source, with the borders that the options ask for. Raises DatasetError."""
    borders = options.borders or ("bod" if options.format == "llm.c" else "file")
    given = ReadOptions(vocab_size=options.vocab_size, dtype=options.dtype, column=options.column, borders=borders == "file")
    source = FORMATS[options.format](options.inputs, given)
    if borders == "file":
        if not source.has_borders:
            raise DatasetError(
                f"{', '.join(options.inputs)}: the files do not say where documents end. --borders eod ends one after each end-of-document token, "
                "--borders bod begins one at each of them"
            )
        return source
    if options.eod is None:
        raise DatasetError(f"--borders {borders} needs the id of the end-of-document token; give --eod ID or the tokenizer (-t, -v)")
    return Split(source, options.eod, before=borders == "bod")


def refuse_own_files(options: ImportOptions, prefix: Path) -> None:
    """Raises DatasetError if the pair would overwrite its own source."""
    own = {Path(f"{prefix}{suffix}").resolve() for suffix in (".bin", ".idx")}
    for text in options.inputs:
        path = Path(text)
        inside = {file.resolve() for file in path.rglob("*")} if path.is_dir() else {Path(f"{path}{end}").resolve() for end in ("", ".bin", ".idx")}
        if own & inside:
            raise DatasetError(f"--output-prefix {prefix}: this pair is part of the input {text}; choose another name")


def as_written(source: TokenSource, options: ImportOptions, dtype: np.dtype[Any]) -> Iterator[Written]:
    """The source's batches with checked ids, in the pair's type. An empty document has no item, as NeoX writes it. Raises DatasetError."""
    eod = options.eod if options.append_eod else None
    for batch in source.batches():
        check_ids(batch, options.vocab_size)
        tokens_T, sizes_N = batch.tokens_T.astype(dtype), np.asarray(batch.sizes_N).astype(np.int64)
        learned_T = batch.learned_T
        full = sizes_N > 0
        ends_D = np.cumsum(full) if batch.ends_D is None else np.asarray(batch.ends_D)
        sizes_N = sizes_N[full] if batch.ends_D is None else sizes_N
        if eod is not None:
            tokens_T, sizes_N, learned_T = with_ends(tokens_T, sizes_N, ends_D, eod, learned_T)
        yield Written(tokens_T, sizes_N, ends_D, None if learned_T is None else np.where(learned_T, tokens_T, IGNORED).astype(dtype))


def with_ends(
    tokens_T: np.ndarray, sizes_N: np.ndarray, ends_D: np.ndarray, eod: int, learned_T: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The same documents, each with `eod` at its end. An end that is added is learned. Empty documents stay empty."""
    last = ends_D[np.diff(ends_D, prepend=0) > 0] - 1  # the last item of each document that has one
    places = np.cumsum(sizes_N)[last]
    missing = np.where(places > 0, tokens_T[places - 1] != eod, True)
    sizes_N = sizes_N.copy()
    sizes_N[last[missing]] += 1
    inserted = None if learned_T is None else np.insert(learned_T, places[missing], True)
    return np.insert(tokens_T, places[missing], eod), sizes_N, inserted


def check_ids(batch: Documents, vocab_size: int) -> None:
    if not len(batch.tokens_T):
        return
    low, high = int(batch.tokens_T.min()), int(batch.tokens_T.max())
    if low < 0 or high >= vocab_size:
        raise DatasetError(
            f"{batch.origin} and what follows: token ids {low:,}..{high:,}, but the vocabulary has {vocab_size:,} (0..{vocab_size - 1:,}). They "
            "come from another tokenizer, or they have another type (--dtype). Nothing was written"
        )


def check_written(prefixes: Sequence[Path], batches: Iterator[Written], reporter: Reporter, tokens: int) -> None:
    """Reads the source again and compares. Raises DatasetError at the first difference."""
    pairs = [IndexedDataset(prefix) for prefix in prefixes]
    token = item = document = 0
    with reporter.stage("checking", tokens) as stage:
        for batch in batches:
            ends = slice(document, document + len(batch.ends_D))
            for pair, values_T in zip(pairs, batch.columns, strict=True):
                same = (
                    np.array_equal(pair.tokens[token : token + len(batch.tokens_T)], values_T)
                    and np.array_equal(pair.sizes[item : item + len(batch.sizes_N)], batch.sizes_N)
                    and np.array_equal(pair.document_ends[ends], batch.ends_D + item)
                )
                if not same:
                    raise DatasetError(
                        f"{pair.bin_path} differs from the source after token {token:,} (document {document:,}): the source has changed, or the "
                        "disk has a fault. Import it again"
                    )
            token, item, document = token + len(batch.tokens_T), item + len(batch.sizes_N), ends.stop
            stage.advance(batch.tokens_T.nbytes, len(batch.ends_D), len(batch.tokens_T), position=token)
    if any((pair.num_tokens, len(pair), len(pair.document_ends)) != (token, item, document) for pair in pairs):
        raise DatasetError(f"{prefixes[0]}.bin has more or fewer tokens than the source: the source has changed meanwhile. Import it again")
