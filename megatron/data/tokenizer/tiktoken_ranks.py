"""The `tiktoken` library: OpenAI's encodings by name, and Llama 3's `tokenizer.model`, which is a file of its kind."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.config.machine import import_optional
from megatron.data.tokenizer import TokenizerError

# Llama 3's file holds the ranks alone. These are Meta's: how text is cut before the ranks apply, and 256 special ids after the 128,000 ranks.
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = 256
LLAMA3_END_OF_TEXT = 128_001
LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The library's matcher overflows its stack on very long texts and runs of one kind, so Meta's tokenizer cuts them at these lengths; so does this one.
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
LONG_SPACE = re.compile(rf"\s{{{LONGEST_RUN + 1}}}")
RUN = re.compile(rf"\s{{1,{LONGEST_RUN}}}|\S{{1,{LONGEST_RUN}}}")


class TiktokenTokenizer:
    """Text that spells a special token stays text. `vocab_file` is the name of an encoding (the library downloads it once) or Llama 3's file;
    `merge_file` is not read.

    Raises TokenizerError when the package is missing, the name is unknown or cannot be downloaded, or the file is not Llama 3's.
    """

    def __init__(self, vocab_file: str | Path | None, merge_file: str | Path | None = None) -> None:
        if vocab_file is None:
            raise TokenizerError(
                "tokenizer_type TiktokenTokenizer needs vocab_file: the name of an encoding (cl100k_base) or the path of Llama 3's file"
            )
        try:
            library: Any = import_optional("tiktoken")
        except ImportError:
            raise TokenizerError(
                "tokenizer_type TiktokenTokenizer needs the package tiktoken: `pip install tiktoken` (see requirements/requirements-tiktoken.txt)"
            ) from None
        self.unknown = None  # every byte is a token
        self.vocab_size: int
        self.eod: int | None
        if Path(vocab_file).is_file():
            self._encoding = library.Encoding(
                "llama3",
                pat_str=LLAMA3_PATTERN,
                mergeable_ranks=read_llama3_ranks(Path(vocab_file)),
                special_tokens={"<|end_of_text|>": LLAMA3_END_OF_TEXT},
            )
            self.vocab_size, self.eod = LLAMA3_RANKS + LLAMA3_SPECIAL, LLAMA3_END_OF_TEXT
        else:
            self._encoding = get_encoding(library, str(vocab_file))
            special = self._encoding.special_tokens_set
            self.vocab_size = self._encoding.n_vocab
            self.eod = self._encoding.eot_token if "<|endoftext|>" in special else None

    def token_to_id(self, token: str) -> int | None:
        try:
            number: int = self._encoding.encode_single_token(token)
        except KeyError:
            return None
        return number

    def loses(self, character: str) -> bool:
        return False

    def unknown_pieces(self, text: str) -> list[str]:
        return []

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([token for token in ids if token in self._text_ids])
        return text

    @cached_property
    def _text_ids(self) -> frozenset[int]:
        """Ids that stand for bytes: neither special nor unused."""
        return frozenset(self._encoding.encode_single_token(value) for value in self._encoding.token_byte_values())


def pieces(text: str) -> Iterator[str]:
    """Text cut every 400,000 characters, then after every 25,000 characters in a row that are all white space or all something else."""
    for start in range(0, len(text), LONGEST_TEXT):
        part = text[start : start + LONGEST_TEXT] if len(text) > LONGEST_TEXT else text
        if len(part) <= LONGEST_RUN or (max(map(len, part.split()), default=0) <= LONGEST_RUN and not LONG_SPACE.search(part)):
            yield part
            continue
        begin = 0
        for run in RUN.finditer(part):
            following = part[run.end() : run.end() + 1]
            if run.end() - run.start() == LONGEST_RUN and following and following.isspace() == part[run.start()].isspace():
                yield part[begin : run.end()]
                begin = run.end()
        yield part[begin:]


def get_encoding(library: Any, name: str) -> Any:
    known = library.list_encoding_names()
    if name not in known:
        raise TokenizerError(
            f"vocab_file: {name!r} is neither a file nor an encoding of tiktoken ({', '.join(known)}). The only file that can be given here is "
            "Llama 3's tokenizer.model"
        )
    try:
        return library.get_encoding(name)
    except OSError as error:  # what `requests` raises, too
        raise TokenizerError(
            f"vocab_file: tiktoken could not download {name} ({type(error).__name__}); without a network, set TIKTOKEN_CACHE_DIR to a folder "
            "that holds this encoding, downloaded on another machine"
        ) from None


def read_llama3_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of Llama 3's file, lines of `base64 rank`. Raises TokenizerError for any other file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            hint = "a SentencePiece model is read by SPMTokenizer, a tokenizer.json by HFTokenizer"
            raise TokenizerError(f"vocab_file: line {number} of {path} is not `base64 rank`, so it is no tiktoken file; {hint}") from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise TokenizerError(
            f"vocab_file: {path} holds {len(ranks):,} ranks. A tiktoken file does not say how text is cut, so only Llama 3's file "
            f"(ranks 0..{LLAMA3_RANKS - 1}) can be read here. "
            "This one is cut short or from another model: use that model's tokenizer.json with HFTokenizer"
        )
    return ranks
