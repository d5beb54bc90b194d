"""Text to token ids and back. One file a family; `build_tokenizer` picks by `tokenizer_type`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

# Type -> module and class; a class is called with (vocab_file, merge_file) and says what it misses.
_CLASSES = {
    "GPT2BPETokenizer": ("gpt2", "GPT2BPETokenizer"),
    "HFTokenizer": ("huggingface", "HFTokenizer"),
    "HFGPT2Tokenizer": ("gpt2", "HFGPT2Tokenizer"),
    "SPMTokenizer": ("sentence_pieces", "SPMTokenizer"),
    "CharLevelTokenizer": ("character", "CharLevelTokenizer"),
    "TiktokenTokenizer": ("tiktoken_ranks", "TiktokenTokenizer"),
}
TYPES = tuple(_CLASSES)
NULL = "NullTokenizer"
"""The type of a configuration whose data is tokenized already; no text can be read with it."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or used. The message names the file or setting and says what to do."""


class Tokenizer(Protocol):
    """The interface that training, generation and data preparation use."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added ones included; every id is smaller."""

    @property
    def eod(self) -> int | None:
        """The id that ends a document; None when the vocabulary has none (`end_of_document` raises then)."""

    def token_to_id(self, token: str) -> int | None:
        """The id of an entry, special ones included. None: there is no such entry."""

    @property
    def unknown(self) -> int | None:
        """The id that stands for text outside the vocabulary. None: there is no such id."""

    def loses(self, character: str) -> bool:
        """Whether encoding drops this character, because no token stands for it. A character that becomes `unknown` is not dropped."""

    def unknown_pieces(self, text: str) -> list[str]:
        """The pieces of a text that become `unknown`, once for every time."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, text by text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; what is not UTF-8 becomes U+FFFD."""


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that a config names (`tokenizer_type`, `vocab_file`, `merge_file`, `vocab_size`). Raises TokenizerError."""
    if data.tokenizer_type == NULL:
        from megatron.data.tokenizer.null import NullTokenizer

        return NullTokenizer(data.vocab_size)
    return load_tokenizer(data.tokenizer_type, data.vocab_file, data.merge_file)


def load_tokenizer(tokenizer_type: str, vocab_file: str | Path | None, merge_file: str | Path | None = None) -> Tokenizer:
    """A tokenizer by its type. Either file may be None for types that do not read it. Raises TokenizerError."""
    if tokenizer_type not in _CLASSES:
        raise TokenizerError(f"tokenizer_type = {tokenizer_type!r} is unknown; the tokenizer types are: {', '.join(TYPES)}")
    module, name = _CLASSES[tokenizer_type]
    kind: Any = getattr(importlib.import_module(f"megatron.data.tokenizer.{module}"), name)
    tokenizer: Tokenizer = kind(vocab_file, merge_file)
    return tokenizer


def end_of_document(tokenizer: Tokenizer, purpose: str) -> int:
    """`tokenizer.eod`; raises TokenizerError when there is none. `purpose` says what it is needed for ("--append-eod")."""
    if tokenizer.eod is None:
        raise TokenizerError(
            f"{purpose} needs a token that ends a document, and this tokenizer has none: no <|endoftext|>, <|end_of_text|>, </s> or <eos> in its "
            f"vocabulary and no eos_token in a tokenizer_config.json beside its file. Add an eos_token there, or switch {purpose} off"
        )
    return tokenizer.eod
