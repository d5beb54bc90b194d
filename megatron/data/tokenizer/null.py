"""No tokenizer: the data is tokenized already. Megatron-LM's NullTokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from megatron.data.tokenizer import TokenizerError


class NullTokenizer:
    """Knows only the number of tokens. Everything that needs text raises TokenizerError."""

    eod = None
    unknown = None

    def __init__(self, vocab_size: int | None) -> None:
        if vocab_size is None:
            raise TokenizerError("tokenizer_type NullTokenizer needs vocab_size: the number of different tokens in the data")
        self.vocab_size: int = vocab_size

    def token_to_id(self, token: str) -> int | None:
        return None

    def loses(self, character: str) -> bool:
        return False

    def unknown_pieces(self, text: str) -> list[str]:
        return []

    def encode(self, text: str) -> list[int]:
        _refuse()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        _refuse()

    def decode(self, ids: Sequence[int]) -> str:
        _refuse()


def _refuse() -> NoReturn:
    raise TokenizerError(
        "tokenizer_type NullTokenizer cannot read or write text: it is for training on data that is tokenized already. "
        "Name the model's tokenizer with tokenizer_type and vocab_file"
    )
