"""Writes a `.bin/.idx` pair in the format of another program, in a folder that appears complete or not at all.

datatrove's and OLMo's files are written here. MDS and litdata are written by their own packages, so that the index, the shards and the hashes are
theirs.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import DatasetError, IndexedDataset, sync
from megatron.data.optional import import_optional
from megatron.data.progress import Reporter, Stage
from megatron.data.staging import publish, staging_folder

COPY_TOKENS = 1 << 22
CHUNK_BYTES = 1 << 26


def export_tokens(kind: str, prefix: str, folder: Path, reporter: Reporter) -> tuple[int, int]:
    """(documents, tokens) that were written to the new folder. Raises DatasetError."""
    pair = IndexedDataset(prefix)
    if pair.dtype.kind == "f" or (pair.num_tokens and int(pair.tokens[:COPY_TOKENS].min()) < 0):
        raise DatasetError(
            f"{pair.bin_path} does not hold token ids but {'numbers' if pair.dtype.kind == 'f' else 'labels'}; only tokens are exported"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(
            f"--output {folder}: this {'folder holds files already' if folder.is_dir() else 'is a file'}; give the name of a new folder"
        )
    if not folder.parent.is_dir():
        raise DatasetError(f"--output {folder}: there is no folder {folder.parent}; make it or choose another one")
    with staging_folder(folder) as stage, reporter.stage("exporting", pair.num_tokens) as shown:
        WRITERS[kind](pair, stage, shown)
        publish(stage, folder)
    return len(pair.document_ends), pair.num_tokens


def write_raw(pair: IndexedDataset, path: Path, shown: Stage) -> None:
    """The tokens as unsigned numbers of the pair's size."""
    done = 0
    with path.open("wb") as file:
        for start in range(0, pair.num_tokens, COPY_TOKENS):
            piece = pair.tokens[start : start + COPY_TOKENS]
            check_fits(pair, piece, unsigned(pair))
            file.write(piece.astype(unsigned(pair)).data)
            done += len(piece)
            shown.advance(piece.nbytes, 0, len(piece), position=done)
        sync(file)


def check_fits(pair: IndexedDataset, piece_T: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Raises DatasetError if the type cannot hold a number of the piece, which would become another token."""
    low, high, most = int(piece_T.min()), int(piece_T.max()), np.iinfo(dtype).max
    if low < 0 or high > most:
        raise DatasetError(
            f"{pair.bin_path} holds the number {low if low < 0 else high:,}; the format stores token ids from 0 to {most:,}. Nothing was written"
        )


def unsigned(pair: IndexedDataset) -> np.dtype[Any]:
    return np.dtype("<u2") if pair.dtype.itemsize <= 2 else np.dtype("<u4")


def document_ends(pair: IndexedDataset) -> Iterator[np.ndarray]:
    """Where each document ends, in tokens; some at a time."""
    item = token = 0
    for start in range(0, len(pair.document_ends), COPY_TOKENS):
        ends = pair.document_ends[start : start + COPY_TOKENS]
        item_ends = token + np.append(0, np.cumsum(pair.sizes[item : ends[-1]], dtype=np.int64))
        yield item_ends[ends - item]
        item, token = int(ends[-1]), int(item_ends[-1])


def write_datatrove(pair: IndexedDataset, folder: Path, shown: Stage) -> None:
    name = f"{pair.prefix.name}.ds"
    write_raw(pair, folder / name, shown)
    with (folder / f"{name}.index").open("wb") as file:
        for ends in document_ends(pair):
            file.write(ends.astype("<u8").data)
    (folder / f"{name}.metadata").write_text(f"{pair.prefix.name}|{unsigned(pair).itemsize}\n{pair.num_tokens}\n{pair.num_tokens:,} T")


def write_olmo(pair: IndexedDataset, folder: Path, shown: Stage) -> None:
    write_raw(pair, folder / f"{pair.prefix.name}.npy", shown)
    start = 0
    with gzip.open(folder / f"{pair.prefix.name}.csv.gz", "wt", compresslevel=3) as file:
        for ends in document_ends(pair):
            for end in ends.tolist():
                file.write(f"{start},{end}\n")
                start = end


def documents(pair: IndexedDataset, shown: Stage) -> Iterator[np.ndarray]:
    """The tokens of each document that has some."""
    start = 0
    for ends in document_ends(pair):
        for end in ends.tolist():
            tokens_T = pair.tokens[start:end]
            shown.advance(tokens_T.nbytes, 1, end - start, position=end)
            if end > start:
                yield tokens_T
            start = end


def write_mds(pair: IndexedDataset, folder: Path, shown: Stage) -> None:
    package = import_optional("streaming", "writing MDS needs the package mosaicml-streaming (`pip install mosaicml-streaming`)")
    dtype = pair.dtype.name
    with package.MDSWriter(out=str(folder / "shards"), columns={"tokens": f"ndarray:{dtype}"}, compression="zstd", hashes=["sha1"]) as writer:
        for tokens_T in documents(pair, shown):
            writer.write({"tokens": np.ascontiguousarray(tokens_T)})
    for path in (folder / "shards").iterdir():
        path.rename(folder / path.name)
    (folder / "shards").rmdir()


def write_litdata(pair: IndexedDataset, folder: Path, shown: Stage) -> None:
    sentence = "writing litdata needs the package litdata (`pip install litdata`)"
    writer_of, loaders = import_optional("litdata.streaming.writer", sentence), import_optional("litdata.streaming.item_loader", sentence)
    writer = writer_of.BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=loaders.TokensLoader())
    for number, tokens_T in enumerate(documents(pair, shown)):
        writer.add_item(number, np.ascontiguousarray(tokens_T))
    writer.done()
    writer.merge()


WRITERS: dict[str, Callable[[IndexedDataset, Path, Stage], None]] = {
    "datatrove": write_datatrove,
    "olmo": write_olmo,
    "mds": write_mds,
    "litdata": write_litdata,
}
