"""Finds documents in a stream of tokens: after each end-of-document token, or before each of them.

llm.c and modded-nanogpt write the token before a document; OLMo, Dolma and llm-foundry write it behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron.data.formats.source import Documents, TokenSource
from megatron.data.indexed import DatasetError

MOST_TOKENS = 1 << 28
"""Without a border: no text is so long."""


class Split:
    """A TokenSource with the tokens of another one, whose documents begin or end at the token `border`."""

    has_borders = True

    def __init__(self, source: TokenSource, border: int, *, before: bool) -> None:
        self._source, self._border, self._before = source, border, before
        self.tokens, self.has_loss, self.notes = source.tokens, source.has_loss, source.notes

    def batches(self) -> Iterator[Documents]:
        rest: list[Documents] = []  # of the document that goes on in the next piece
        for piece in self._source.batches():
            places = np.flatnonzero(piece.tokens_T == self._border)
            cuts = places if self._before else places + 1
            if not len(cuts) or (len(cuts) == 1 and cuts[0] == 0 and not rest):
                rest.append(piece)
                self._check_length(rest)
                continue
            first, last = int(cuts[0]), int(cuts[-1])
            yield joined([*rest, part(piece, 0, first)], part(piece, first, last), np.diff(cuts))
            rest = [part(piece, last, len(piece.tokens_T))]
        if any(len(piece.tokens_T) for piece in rest):
            yield joined(rest, None, np.empty(0, np.int64))

    def _check_length(self, rest: Sequence[Documents]) -> None:
        if sum(len(piece.tokens_T) for piece in rest) > MOST_TOKENS:
            raise DatasetError(
                f"{rest[0].origin}: no token {self._border} in {MOST_TOKENS:,} tokens, so it does not part the documents. Give the id that does with "
                "--eod, and --dtype if the tokens have another type"
            )


def part(piece: Documents, start: int, end: int) -> Documents:
    learned_T = None if piece.learned_T is None else piece.learned_T[start:end]
    return piece._replace(tokens_T=piece.tokens_T[start:end], learned_T=learned_T)


def joined(head: Sequence[Documents], body: Documents | None, sizes_N: np.ndarray) -> Documents:
    """The document that `head` completes, if it has tokens, then the documents of `body` with these sizes."""
    pieces = [*head, *([] if body is None else [body])]
    begun = sum(len(piece.tokens_T) for piece in head)
    learned = [piece.learned_T for piece in pieces if piece.learned_T is not None]
    tokens_T = np.concatenate([piece.tokens_T for piece in pieces])
    return Documents(
        pieces[0].origin, tokens_T, np.append([begun] if begun else [], sizes_N).astype(np.int64), None, np.concatenate(learned) if learned else None
    )
