"""Everything that the `tokenizers` library runs: a `tokenizer.json`, and the base class of what is put together from other files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, models

from megatron.data.tokenizer import TokenizerError
from megatron.data.tokenizer.eod import find_end_of_document

INCOMPLETE = "\ufffd"
"""Decoding gives this for bytes that are not a character."""


class RustTokenizer:
    """A tokenizer of the library. Truncation and padding, which its file may ask for, are switched off.

    `folder` may hold a `tokenizer_config.json`.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(len(ids), max(ids, default=0) + 1)  # ids may have gaps
        if not tokenizer.get_vocab(with_added_tokens=False):
            raise TokenizerError(f"vocab_file: the vocabulary is empty: the tokenizer in {folder} has no entries, so it cannot encode any text")
        self.unknown: int | None = unknown_token(tokenizer)
        self._by_character = isinstance(tokenizer.model, models.BPE | models.Unigram)  # the other models know a word whole or not at all
        self._unknown: dict[str, bool] = {}
        self.eod: int | None = find_end_of_document(tokenizer.token_to_id, folder)

    def token_to_id(self, token: str) -> int | None:
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def entry(self, number: int) -> str | None:
        """The text of an entry. None: no entry has this id."""
        text: str | None = self._tokenizer.id_to_token(number)
        return text

    def added_tokens(self) -> dict[str, int]:
        """The added entries, special ones included, with their ids. The tokenizer searches the text for them before it cuts the rest."""
        return {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json."""
        self._tokenizer.save(str(path))

    def loses(self, character: str) -> bool:
        library = self._tokenizer
        ids = self.encode_alone(character)
        if ids:
            return self.unknown not in ids and character != INCOMPLETE and INCOMPLETE in library.decode(ids)  # some of its bytes are left out
        normal = character if library.normalizer is None else library.normalizer.normalize_str(character)
        pieces = [normal] if library.pre_tokenizer is None else [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(normal)]
        return bool(normal) and (bool(normal.strip()) if not pieces else any(piece.strip() for piece in pieces))

    def encode_alone(self, text: str) -> list[int]:
        """The ids of `text` without the tokens that the file's own template adds."""
        with _explained():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def unknown_pieces(self, text: str) -> list[str]:
        if self._by_character and (characters := [character for character in set(text) if self._is_unknown(character)]):
            return [character for character in characters for _ in range(text.count(character))]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pieces = [text[start:end] for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True) if number == self.unknown]
        return [piece for piece in pieces if piece != self.entry(self.unknown or 0)]

    def _is_unknown(self, character: str) -> bool:
        if character not in self._unknown:
            self._unknown[character] = self.unknown in self.encode_alone(character)
        return self._unknown[character]

    def encode(self, text: str) -> list[int]:
        with _explained():
            ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Uses the library's own threads; with TOKENIZERS_PARALLELISM=false only this one."""
        with _explained():
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


@contextmanager
def _explained() -> Iterator[None]:
    """What the library says of a text that it cannot encode, as a TokenizerError."""
    try:
        yield
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"vocab_file: the tokenizer cannot encode a text ({error}): its file lacks something") from None


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id of the token for text outside the vocabulary. None: there is no such token."""
    if isinstance(tokenizer.model, models.Unigram):
        number: int | None = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return number
    text = getattr(tokenizer.model, "unk_token", None)
    return None if text is None else tokenizer.token_to_id(text)


class HFTokenizer(RustTokenizer):
    """Encodes as NeoX's HFTokenizer does, with the special tokens that the file's own template adds. `merge_file` is not read.

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
