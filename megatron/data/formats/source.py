"""What a reader of a foreign format gives: documents as arrays of token ids, some at a time.

Shapes: T tokens, N items (sequences) and D documents of one batch; a document is one item in all formats but Megatron's
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron.data.indexed import DatasetError
from megatron.data.input.input_files import natural_order

BATCH_TOKENS = 1 << 20
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64))


class Documents(NamedTuple):
    """Items end to end. `ends_D`: the number of items up to the end of each document; None: each item is a document. `learned_T`: whether the loss
    counts a token; None: it counts all."""

    origin: str
    tokens_T: np.ndarray
    sizes_N: np.ndarray
    ends_D: np.ndarray | None = None
    learned_T: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """`dtype` None: what the format says, or what the vocabulary needs. `column` None: the only one, or one with a usual name. `borders` False: the
    tokens say where documents end, so files that say it are not read."""

    vocab_size: int
    dtype: np.dtype[Any] | None = None
    column: str | None = None
    borders: bool = True


class TokenSource(Protocol):
    """An opened corpus: its files are there and have the sizes that they should have. `has_borders`: the batches' items are documents and not just
    pieces of the stream. `has_loss`: every batch has `learned_T`. `notes`: sentences for the user."""

    tokens: int
    has_borders: bool
    has_loss: bool
    notes: Sequence[str]

    def batches(self) -> Iterator[Documents]:
        """All tokens in order, at most about BATCH_TOKENS at a time (more in a longer document). Can be called again. Raises DatasetError."""


def cut(origin: str, tokens_T: np.ndarray, ends_N: np.ndarray, learned_T: np.ndarray | None = None) -> Iterator[Documents]:
    """Batches of a mapped file. `ends_N`: where each document ends, in tokens, ascending."""
    first, start = 0, 0
    while first < len(ends_N):
        after = max(int(np.searchsorted(ends_N, start + BATCH_TOKENS, side="right")), first + 1)
        end = int(ends_N[after - 1])
        sizes_N = np.diff(np.asarray(ends_N[first:after]).astype(np.int64), prepend=start)
        yield Documents(f"{origin}, document {first}", tokens_T[start:end], sizes_N, None, None if learned_T is None else learned_T[start:end])
        first, start = after, end


def stream(origin: str, tokens_T: np.ndarray) -> Iterator[Documents]:
    """Pieces of a mapped file that does not say where its documents are."""
    for start in range(0, len(tokens_T), BATCH_TOKENS):
        piece_T = tokens_T[start : start + BATCH_TOKENS]
        yield Documents(f"{origin}, token {start:,}", piece_T, np.array([len(piece_T)]))


def gathered(items: Iterable[tuple[str, np.ndarray]]) -> Iterator[Documents]:
    """Batches of single documents."""
    origin, arrays, count = "", list[np.ndarray](), 0
    for place, tokens_T in items:
        origin = origin or place
        arrays.append(tokens_T)
        count += len(tokens_T)
        if count >= BATCH_TOKENS:
            yield Documents(origin, np.concatenate(arrays), np.array([len(array) for array in arrays]))
            origin, arrays, count = "", [], 0
    if arrays:
        yield Documents(origin, np.concatenate(arrays), np.array([len(array) for array in arrays]))


def mapped(path: Path, dtype: np.dtype[Any], offset: int = 0) -> np.ndarray:
    """The numbers of a file from byte `offset` on, read-only and mapped. Raises DatasetError if its size is not a whole number of them."""
    size = path.stat().st_size - offset
    if size % dtype.itemsize:
        raise DatasetError(
            f"{path} has {size + offset:,} bytes, which is not a whole number of {dtype} values ({dtype.itemsize} bytes each): it is cut short, "
            "or it holds another type (--dtype)"
        )
    return np.asarray(np.memmap(path, dtype, "r", offset)) if size else np.empty(0, dtype)


def files_for(inputs: Sequence[str], pattern: str, what: str) -> list[Path]:
    """The files that the inputs name; of a folder, those below it that match, in natural order. Raises DatasetError."""
    found: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        below = sorted(path.rglob(pattern), key=lambda file: natural_order(str(file))) if path.is_dir() else [path]
        if not below:
            raise DatasetError(f"{path}: no {pattern} in this folder; give {what}")
        missing = next((file for file in below if not file.is_file()), None)
        if missing is not None:
            raise DatasetError(f"no file {missing}; give {what}")
        found += below
    return found


def unsigned_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type of two or four bytes that holds all ids, which is how datatrove and OLMo store tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
