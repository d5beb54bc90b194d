"""One token a byte of UTF-8: no file, nothing to train. NeoX's CharLevelTokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CharLevelTokenizer:
    """Ids 0..255 are bytes (0 is also the end of a document, as in NeoX). 256..511 are never produced and decode to nothing. Files are not read."""

    vocab_size = 512
    eod = 0
    unknown = None

    def __init__(self, vocab_file: str | Path | None = None, merge_file: str | Path | None = None) -> None: ...

    def token_to_id(self, token: str) -> int | None:
        return None

    def loses(self, character: str) -> bool:
        return False

    def unknown_pieces(self, text: str) -> list[str]:
        return []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token != self.eod and token < 256).decode(errors="replace")
