"""A SentencePiece model, such as the `tokenizer.model` of Llama 1, Llama 2 and Mistral."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron.data.tokenizer import TokenizerError

END_OF_TEXT = "<|endoftext|>"


class SPMTokenizer:
    """The library's ids, without <s> before and </s> after them. Text that spells these tokens stays text. `merge_file` is not read.

    `eod` is <|endoftext|> where the model has that piece, else its end-of-sentence piece (</s>); None when it has neither.
    Raises TokenizerError when the file is missing or not such a model.
    """

    def __init__(self, vocab_file: str | Path | None, merge_file: str | Path | None = None) -> None:
        if vocab_file is None:
            raise TokenizerError("tokenizer_type SPMTokenizer needs vocab_file: the path of a SentencePiece model (tokenizer.model)")
        self._processor = read_model(Path(vocab_file))
        self.vocab_size: int = self._processor.get_piece_size()
        unknown: int = self._processor.unk_id()
        self._unknown: dict[str, bool] = {}
        self.unknown: int | None = unknown if unknown >= 0 else None
        named, end = self._processor.piece_to_id(END_OF_TEXT), self._processor.eos_id()
        candidates = (number for number in (named, end) if number not in (-1, self._processor.unk_id()))
        self.eod: int | None = next(candidates, None)

    def token_to_id(self, token: str) -> int | None:
        number: int = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def loses(self, character: str) -> bool:
        return False  # it becomes `unknown`

    def unknown_pieces(self, text: str) -> list[str]:
        characters = [character for character in set(text) if self._is_unknown(character)]
        if characters:
            return [character for character in characters for _ in range(text.count(character))]
        pieces = zip(self.encode(text), self._processor.encode(text, out_type=str), strict=True)  # the library's own objects need protobuf
        return [piece.replace("\u2581", " ") for number, piece in pieces if number == self.unknown]

    def _is_unknown(self, character: str) -> bool:
        if character not in self._unknown:
            self._unknown[character] = self.unknown in self.encode(character)
        return self._unknown[character]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([token for token in ids if token != self.eod])
        return text


def read_model(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise TokenizerError(f"vocab_file: no file {path}; give the path of a SentencePiece model (tokenizer.model)")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        hint = "it looks like a tiktoken file (Llama 3's): use TiktokenTokenizer" if looks_like_ranks(path) else str(error)
        raise TokenizerError(f"vocab_file: {path} is not a SentencePiece model ({hint})") from None


def looks_like_ranks(path: Path) -> bool:
    """Whether the first line is `base64 number`."""
    with path.open("rb") as file:
        fields = file.readline(200).split()
    return len(fields) == 2 and fields[1].isdigit()
