"""The parts of a text that a tokenizer loses: characters that no token stands for, and pieces that become its unknown token.

Changes by the tokenizer's rules (lower case, NFKC, one space for several) are not losses. The check looks once at each distinct character, and it
searches the ids for the unknown token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from megatron.data.indexed import DatasetError

if TYPE_CHECKING:
    from megatron.data.tokenizer import Tokenizer

SHOWN = 5
SHOWN_ORIGINS = 3


class LossFinder:
    """Remembers which characters a tokenizer loses."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._seen: set[str] = set()
        self._lost: set[str] = set()

    def find(self, text: str, ids: Sequence[int]) -> Counter[str]:
        """The pieces of `text` that are lost in its `ids`, and how often each is. Empty if nothing is lost."""
        characters = set(text)
        new = characters - self._seen
        if new:
            self._lost |= {character for character in new if self._tokenizer.loses(character)}
            self._seen |= new
        found = Counter({character: text.count(character) for character in self._lost & characters})
        if self._tokenizer.unknown is not None and self._tokenizer.unknown in ids:
            found.update(self._tokenizer.unknown_pieces(text))
        return found


def lost_text(pieces: Counter[str]) -> str:
    """`45 characters ('z' 40 times, 'q' 5 times)`."""
    count = sum(len(piece) * times for piece, times in pieces.items())
    shown = [f"{piece!r} {times:,} time{'s' if times > 1 else ''}" for piece, times in pieces.most_common(SHOWN)]
    rest = [f"{len(pieces) - SHOWN:,} others"] if len(pieces) > SHOWN else []
    return f"{count:,} character{'s' if count > 1 else ''} ({', '.join([*shown, *rest])})"


class Losses:
    """Collects the losses of many texts. With `on_error` fail the first loss raises DatasetError."""

    def __init__(self, on_error: Literal["fail", "skip"]) -> None:
        self._on_error = on_error
        self._origins: list[str] = []
        self.pieces: Counter[str] = Counter()
        self.documents = 0

    def note(self, origin: str, pieces: Counter[str]) -> None:
        """`origin` says which text it is (file:line). Raises DatasetError."""
        if self._on_error == "fail":
            raise DatasetError(
                f"{origin}: the tokenizer has no tokens for {lost_text(pieces)} of this text, so they would be lost. Nothing was written. Use "
                "a tokenizer that has them, or --on-error skip to continue without these characters"
            )
        self.documents += 1
        self.pieces.update(pieces)
        if len(self._origins) < SHOWN_ORIGINS:
            self._origins.append(origin)

    def summary(self) -> list[str]:
        """Lines for the end of the work; none when nothing was lost."""
        if not self.documents:
            return []
        documents = f"{self.documents:,} document{'s' if self.documents > 1 else ''}"
        first = ", ".join(self._origins) + (", ..." if self.documents > len(self._origins) else "")
        return [f"lost: the tokenizer has no tokens for {lost_text(self.pieces)} of {documents}: {first}"]
