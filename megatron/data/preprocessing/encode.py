"""Encodes texts in batches: a batch of strings becomes arrays, one array for each output.

Shapes: N documents of a batch, T tokens of all of them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np

from megatron.data.indexed import token_dtype
from megatron.data.input.bad_input import Kind
from megatron.data.optional import import_optional
from megatron.data.tokenizer import Tokenizer, end_of_document, load_tokenizer
from megatron.data.tokenizer.lost import LossFinder

BATCH_BYTES = 1 << 18
IGNORED = -100
"""The label of a token that is not predicted, as in PyTorch and NeoX."""

Piece = TypeVar("Piece")


class Column(NamedTuple):
    """The documents of one output, end to end."""

    tokens_T: np.ndarray
    sizes_N: np.ndarray


class Unusable(NamedTuple):
    """Document `row` of a batch has no tokens in any column."""

    row: int
    kind: Kind
    what: str


class Encoded(NamedTuple):
    """`lost`: the rows of documents of which the tokenizer loses pieces, with these pieces and their counts."""

    columns: list[Column]
    unusable: list[Unusable]
    lost: Sequence[tuple[int, Counter[str]]] = ()


def column(documents: Sequence[Sequence[float]], dtype: np.dtype[Any]) -> Column:
    sizes_N = np.fromiter(map(len, documents), np.int32, len(documents))
    return Column(np.fromiter(chain.from_iterable(documents), dtype, int(sizes_N.sum())), sizes_N)


def batches(pieces: Iterable[Piece], size: Callable[[Piece], int]) -> Iterator[list[Piece]]:
    """Lists whose sizes (by `size`) sum to at least BATCH_BYTES; the last one may be smaller."""
    batch: list[Piece] = []
    filled = 0
    for piece in pieces:
        batch.append(piece)
        filled += size(piece)
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class TextTask:
    """Turns documents into one column for each key. A document is a tuple of texts, one for each key. If `mask_before` is not empty, there is a
    single
    key, and a column of labels follows: the tokens, but IGNORED up to and including the first place of `mask_before`, if it occurs."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    append_eod: bool = False
    ftfy: bool = False
    mask_before: tuple[int, ...] = ()

    def load(self) -> Tokenizer:
        """Raises TokenizerError, also when there is no token to append."""
        tokenizer = load_tokenizer(self.tokenizer_type, self.vocab_file, self.merge_file)
        if self.append_eod:
            end_of_document(tokenizer, "--append-eod")
        return tokenizer

    def dtype(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        """The type that NeoX stores. With labels it must be signed, because IGNORED is negative; tokens with labels have the same type."""
        return np.dtype("<i4") if self.mask_before else token_dtype(tokenizer.vocab_size)

    def start(self) -> Callable[[Sequence[tuple[str, ...]]], Encoded]:
        tokenizer, fix = self.load(), load_ftfy() if self.ftfy else None
        end = [end_of_document(tokenizer, "--append-eod")] if self.append_eod else []
        dtype, finder = self.dtype(tokenizer), LossFinder(tokenizer)

        def encode(batch: Sequence[tuple[str, ...]]) -> Encoded:
            keys = [[fix(text) for text in texts] if fix else texts for texts in zip(*batch, strict=True)]
            encoded = [tokenizer.encode_batch(texts) for texts in keys]
            lost = find_lost(finder, keys, encoded)
            unusable = [Unusable(row, Kind.BLANK, "no tokens in it") for row, ids in enumerate(zip(*encoded, strict=True)) if not all(ids)]
            for row, _, _ in unusable:
                for documents in encoded:
                    documents[row] = []
            if end:
                for ids in chain.from_iterable(encoded):
                    ids += end if ids else ()
            columns = [column(documents, dtype) for documents in encoded]
            return Encoded([*columns, *(masked(text, self.mask_before) for text in columns if self.mask_before)], unusable, lost)

        return encode


def find_lost(finder: LossFinder, texts: Sequence[Sequence[str]], ids: Sequence[Sequence[Sequence[int]]]) -> list[tuple[int, Counter[str]]]:
    """(row, lost pieces) of a batch. `texts` and `ids` hold one list for each key, with an entry for each document."""
    lost: dict[int, Counter[str]] = {}
    for of_key, ids_of_key in zip(texts, ids, strict=True):
        for row, (text, tokens) in enumerate(zip(of_key, ids_of_key, strict=True)):
            if pieces := finder.find(text, tokens):
                lost.setdefault(row, Counter()).update(pieces)
    return sorted(lost.items())


def masked(text: Column, pattern: tuple[int, ...]) -> Column:
    """Labels for `text`, see TextTask."""
    tokens_T = text.tokens_T
    labels_T = tokens_T.copy()
    if len(tokens_T) >= len(pattern):
        windows = np.lib.stride_tricks.sliding_window_view(tokens_T, len(pattern))
        found = np.flatnonzero((windows == np.array(pattern, tokens_T.dtype)).all(axis=1))
        ends_N = np.cumsum(text.sizes_N)
        documents = np.searchsorted(ends_N, found, side="right")
        inside = found + len(pattern) <= ends_N[documents]
        for document, first in zip(*np.unique(documents[inside], return_index=True), strict=True):
            start = int(ends_N[document] - text.sizes_N[document])
            labels_T[start : found[inside][first] + len(pattern)] = IGNORED
    return Column(labels_T, text.sizes_N)


def load_ftfy() -> Callable[[str], str]:
    """ftfy.fix_text. Raises DatasetError when the package is not installed."""
    library = import_optional("ftfy", "--ftfy needs the package ftfy: `pip install ftfy` (pinned in requirements/requirements-ftfy.txt)")
    fix: Callable[[str], str] = library.fix_text
    return fix
