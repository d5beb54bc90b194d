"""What a task asks, as rows of tokens: which positions are scored, and which rows can share one pass through the model.

Attention looks back only. So if a row's tokens are the beginning of a longer row's, the longer row has all its logits: the four one-letter answers of
a question are one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Scored(NamedTuple):
    """A part of a continuation, and what the model reads before each of its tokens."""

    request: int
    """Number of the request that it belongs to."""
    tokens: tuple[int, ...]
    """What the model reads: the context and the continuation without its last token."""
    targets: tuple[int, ...]
    """The continuation. Target i is predicted at position len(tokens) - len(targets) + i."""

    @property
    def first(self) -> int:
        """The position that predicts the first target."""
        return len(self.tokens) - len(self.targets)


@dataclass
class Row:
    """One pass through the model, and everything that it answers."""

    tokens: tuple[int, ...]
    scored: list[Scored]

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return min(part.first for part in self.scored)


def cut(request: int, context: Sequence[int], continuation: Sequence[int], window: int) -> Iterator[Scored]:
    """The parts of one request for a model that reads at most `window` tokens.

    A context that is too long loses its beginning. A continuation of more than `window` tokens is cut into parts, each with all the context that
    there is room for.
    """
    for begin in range(0, len(continuation), window):
        targets = tuple(continuation[begin : begin + window])
        text = [*context, *continuation[: begin + len(targets)]][-(window + 1) :]
        yield Scored(request, tuple(text[:-1]), targets)


def rows_of(parts: Sequence[Scored], *, merge: bool = True) -> list[Row]:
    """Rows that answer all parts, the longest first. `merge`: rows that begin alike are put together as far as one of them holds the other."""
    if not merge:
        return sorted((Row(part.tokens, [part]) for part in parts), key=lambda row: -len(row.tokens))
    rows: list[Row] = []
    for part in sorted(parts, key=lambda part: part.tokens, reverse=True):  # a row comes right after the longer ones that begin with it
        if rows and rows[-1].tokens[: len(part.tokens)] == part.tokens:
            rows[-1].scored.append(part)
        else:
            rows.append(Row(part.tokens, [part]))
    return sorted(rows, key=lambda row: -len(row.tokens))


def batches_of(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """The rows in batches of at most `tokens` tokens with padding; a longer row is a batch of its own. The rows come with the longest first."""
    batches: list[list[Row]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
