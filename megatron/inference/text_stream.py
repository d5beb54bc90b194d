"""Turns tokens into text that can be shown at once: whole characters, and never a part of a stop string.

The pieces always join to what decoding all tokens gives. But decoding all of them for every new one would cost more and more, so only the last few
are decoded (the tail), and what that text had before is cut off. A tail may begin only where this is exact: tokenizers treat the first token
differently (they drop a leading space, for example), and a character may consist of several tokens. `_shorten` compares before it cuts.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what bytes decode to that do not end a character
KEPT = 8
"""Tokens that a shortened tail has."""
LONGEST = 24
"""A tail with more tokens is shortened."""


class TextStream:
    """The text of tokens that come one by one. A piece of it always ends with a whole character.

    Tokens of single bytes (`<0x0A>`) are shown when their run has ended, because some tokenizers replace all characters of a run that has one broken
    character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = byte_tokens(tokenizer)
        self._tail: list[int] = []
        self._shown_of_tail = ""
        self._limit = LONGEST
        self._in_bytes = False

    def push(self, token: int) -> str:
        """The text that `token` adds. Empty if the token only begins a character."""
        self._tail.append(token)
        if token in self._bytes:
            self._in_bytes = True
            return ""
        text = self._tokenizer.decode(self._tail)
        if self._in_bytes and text == self._tokenizer.decode(self._tail[:-1]):
            return ""  # a token without text, such as a special one, does not end the run
        self._in_bytes = False
        piece = self._show(text.removesuffix(INCOMPLETE))
        if len(self._tail) > self._limit:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """The rest of the text, which `push` did not return yet."""
        return self._show(self._tokenizer.decode(self._tail)) if self._tail else ""

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_of_tail) :]
        self._shown_of_tail = text
        return piece

    def _shorten(self, text: str) -> None:
        """Drops tokens from the start of the tail, if decoding the others gives the rest of `text`. The rest may have a space before it, which the
        tokenizer drops from a text's first token."""
        for start in range(len(self._tail) - KEPT, 0, -1):
            before, rest = (self._tokenizer.decode(part) for part in (self._tail[:start], self._tail[start:]))
            if rest and text in (before + rest, before + " " + rest) and len(self._shown_of_tail) >= len(text) - len(rest):
                self._shown_of_tail = rest[: len(rest) - (len(text) - len(self._shown_of_tail))]
                self._tail = self._tail[start:]
                self._limit = LONGEST
                return
        self._limit = 2 * len(self._tail)  # none of these places will do, so it is tried again later


def byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for one byte, for text that has no other token. Empty if the tokenizer has none of them."""
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)


class StopStrings:
    """Cuts a text before the first stop string in it. What may still become a stop string is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._held = ""
        self.found = False
        """Whether the text has ended at a stop string."""

    def push(self, piece: str) -> str:
        """The text that can be shown when `piece` comes. Nothing is shown after a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._held, self.found = "", True
            return text[: min(ends)[1]]
        kept = len(text) - self._possible_start(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back, if no stop string came."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
