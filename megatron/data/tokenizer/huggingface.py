"""Everything that the `tokenizers` library runs: a `tokenizer.json`, and the base class of what is put together from other files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatron.data.tokenizer import TokenizerError
from megatron.data.tokenizer.eod import find_end_of_document


class RustTokenizer:
    """A tokenizer of the library, used whole: what its file says of truncation and padding is for batches of sentences and is switched off.

    `folder` is where a `tokenizer_config.json` may lie.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(len(ids), max(ids, default=0) + 1)  # ids may have gaps
        self.eod: int | None = find_end_of_document(tokenizer.token_to_id, folder)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On the library's own threads (TOKENIZERS_PARALLELISM=false: on this one)."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


class HFTokenizer(RustTokenizer):
    """Encodes as NeoX's does, including the special tokens that the file's own template adds. `merge_file` is not read.

    Raises TokenizerError when the file is missing or not a tokenizer.
    """

    def __init__(self, vocab_file: str | Path | None, merge_file: str | Path | None = None) -> None:
        if vocab_file is None:
            raise TokenizerError("tokenizer_type HFTokenizer needs vocab_file: the path of a tokenizer.json (`python prepare_data.py` makes one)")
        super().__init__(read_tokenizer_json(Path(vocab_file)), Path(vocab_file).parent)


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Raises TokenizerError."""
    if path.is_dir():
        raise TokenizerError(f"vocab_file: {path} is a folder; give the tokenizer.json in it")
    if not path.is_file():
        raise TokenizerError(f"vocab_file: no file {path}; give the path of a tokenizer.json (`python prepare_data.py` makes one)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"vocab_file: {path} is not a tokenizer.json of the tokenizers library ({error})") from None
