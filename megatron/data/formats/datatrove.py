"""datatrove's token files (Hugging Face): `NAME.ds` (uint16 or uint32 tokens), `NAME.ds.index` (uint64: where each document ends, in tokens),
`NAME.ds.loss` (a byte for each token: 1 if the loss counts it; optional) and `NAME.ds.metadata` (text: tokenizer|bytes per token, tokens; optional).

Facts: datatrove 0.10.1, src/datatrove/pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.formats.source import Documents, ReadOptions, cut, files_for, mapped, stream, unsigned_for
from megatron.data.indexed import DatasetError


class File(NamedTuple):
    path: Path
    tokens_T: np.ndarray
    ends_N: np.ndarray | None
    learned_T: np.ndarray | None


class DatatroveSource:
    """A TokenSource. Without an index a file has no borders."""

    def __init__(self, inputs: Sequence[str], options: ReadOptions) -> None:
        self._files = [open_file(path, options) for path in files_for(inputs, "*.ds", "datatrove's .ds files or their folder")]
        self.tokens = sum(len(file.tokens_T) for file in self._files)
        self.has_borders = all(file.ends_N is not None for file in self._files)
        with_loss = [file.path for file in self._files if file.learned_T is not None]
        if with_loss and len(with_loss) < len(self._files):
            raise DatasetError(f"{with_loss[0]} has a .loss file and other files have none; import the two kinds separately")
        self.has_loss = bool(with_loss)
        self.notes: Sequence[str] = ()

    def batches(self) -> Iterator[Documents]:
        for file in self._files:
            if file.ends_N is None:
                yield from stream(str(file.path), file.tokens_T)
            else:
                yield from cut(str(file.path), file.tokens_T, file.ends_N, file.learned_T)


def open_file(path: Path, options: ReadOptions) -> File:
    """Raises DatasetError if the files do not belong together."""
    metadata = read_metadata(Path(f"{path}.metadata"))
    dtype = options.dtype or (metadata and metadata[0]) or unsigned_for(options.vocab_size)
    tokens_T = mapped(path, dtype)
    if metadata and metadata[1] != len(tokens_T):
        raise DatasetError(
            f"{path} has {len(tokens_T):,} {dtype} tokens, but {path.name}.metadata says {metadata[1]:,}: it is cut short, or has another --dtype"
        )
    index, loss = Path(f"{path}.index"), Path(f"{path}.loss")
    ends_N = mapped(index, np.dtype("<u8")) if options.borders and index.is_file() else None
    if ends_N is not None:
        check_ends(index, ends_N, len(tokens_T), dtype)
    learned_T = mapped(loss, np.dtype("u1")) if loss.is_file() else None
    if learned_T is not None and len(learned_T) != len(tokens_T):
        raise DatasetError(f"{loss} has {len(learned_T):,} values for {len(tokens_T):,} tokens of {path.name}: the two were not written together")
    if learned_T is not None and ends_N is None:
        raise DatasetError(f"{path} has a .loss file, which needs the .index file too: copy it, and leave --borders out")
    return File(path, tokens_T, ends_N, None if learned_T is None else learned_T.view(np.bool_))


def check_ends(index: Path, ends_N: np.ndarray, tokens: int, dtype: np.dtype[Any]) -> None:
    last = int(ends_N[-1]) if len(ends_N) else 0
    if last != tokens:
        raise DatasetError(
            f"{index} ends at token {last:,}, but the tokens' file has {tokens:,} of type {dtype}: a copy was cut short, or the tokens have another "
            "type (--dtype)"
        )
    if len(ends_N) and (ends_N[1:] < ends_N[:-1]).any():
        raise DatasetError(f"{index} is damaged: the ends of the documents are not in order")


def read_metadata(path: Path) -> tuple[np.dtype[Any], int] | None:
    """(the tokens' type, their number). None: there is no such file, or it is not one of datatrove's."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        first, count = path.read_text(encoding="utf-8").splitlines()[:2]
        return np.dtype({2: "<u2", 4: "<u4"}[int(first.rpartition("|")[2])]), int(count)
    return None
