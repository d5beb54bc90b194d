"""Text to token ids and back. One file a kind; `build_tokenizer` picks by `tokenizer_type`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

TYPES = ("HFTokenizer", "CharLevelTokenizer")


class TokenizerError(ValueError):
    """A tokenizer that cannot be had. The message says which file or setting and what to do."""


class Tokenizer(Protocol):
    """What training, generation and data preparation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added ones included; every id is smaller."""

    @property
    def eod(self) -> int | None:
        """The id that ends a document; None when the vocabulary has none."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a config (`tokenizer_type`, `vocab_file`). Raises TokenizerError."""
    return load_tokenizer(data.tokenizer_type, data.vocab_file)


def load_tokenizer(tokenizer_type: str, vocab_file: str | Path | None) -> Tokenizer:
    """`vocab_file` may be None for kinds that read no file. Raises TokenizerError."""
    if tokenizer_type == "CharLevelTokenizer":
        from megatron.data.tokenizer.character import CharLevelTokenizer

        return CharLevelTokenizer()
    if tokenizer_type == "HFTokenizer":
        from megatron.data.tokenizer.huggingface import HFTokenizer

        if vocab_file is None:
            raise TokenizerError("tokenizer_type HFTokenizer needs vocab_file: the path of a tokenizer.json (`python prepare_data.py` makes one)")
        return HFTokenizer(vocab_file)
    raise TokenizerError(f"tokenizer_type = {tokenizer_type!r} is not one of those there are: {', '.join(TYPES)}")
