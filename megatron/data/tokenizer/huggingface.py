"""A `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatron.data.tokenizer import TokenizerError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


class HFTokenizer:
    """Encodes as NeoX's does, including the special tokens that the file's own template adds.

    `eod` is the id of the first of END_OF_DOCUMENT that the vocabulary has, else None.
    Raises TokenizerError when the file is missing or not a tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise TokenizerError(f"vocab_file: no file {path}; give the path of a tokenizer.json (`python prepare_data.py` makes one)")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"vocab_file: {path} is not a tokenizer.json of the tokenizers library ({error})") from None
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        ids = (self._tokenizer.token_to_id(name) for name in END_OF_DOCUMENT)
        self.eod: int | None = next((number for number in ids if number is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, several texts at once on the library's own threads."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(ids))
