"""The pieces of a stream join to the text of all tokens, whatever the tokenizer does, and no token costs more than the first ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustLibrary
from tokenizers import decoders, models

from megatron.convert.sentence_pieces import as_tokenizer, read_piece_model
from megatron.data.tokenizer import Tokenizer, load_tokenizer
from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.data.tokenizer.huggingface import RustTokenizer
from megatron.inference.text_stream import INCOMPLETE, LONGEST, StopStrings, TextStream

SAID = (
    "The Union, as it was: \u00e9t\u00e9, \u65e5\u672c\u8a9e  \U0001f600\U0001f9d1\u200d\U0001f680 and   spaces.\n\n"
    "\tIt's done, isn't it? \u0928\u092e\u0938\u094d\u0924\u0947 "
)


def from_pieces(file: str) -> Callable[[Path], Tokenizer]:
    """A SentencePiece model as the `tokenizers` library runs it: a run of bytes with one broken character is all broken."""
    return lambda folder: RustTokenizer(as_tokenizer(read_piece_model(folder / file), file), folder)


REAL: dict[str, Callable[[Path], Tokenizer]] = {
    "byte-level": lambda folder: load_tokenizer("HFTokenizer", folder / "20B_tokenizer.json"),
    "gpt2": lambda folder: load_tokenizer("GPT2BPETokenizer", folder / "gpt2" / "vocab.json", folder / "gpt2" / "merges.txt"),
    "sentencepiece": lambda folder: load_tokenizer("SPMTokenizer", folder / "llama2_tokenizer.model"),
    "mistral": lambda folder: load_tokenizer("SPMTokenizer", folder / "mistral_v1_tokenizer.model"),
    "tiktoken": lambda folder: load_tokenizer("TiktokenTokenizer", folder / "llama3_tokenizer.model"),
    "byte-fallback": from_pieces("llama2_tokenizer.model"),
    "byte-fallback-mistral": from_pieces("mistral_v1_tokenizer.model"),
}


@pytest.fixture(scope="module", params=list(REAL))
def real(request: pytest.FixtureRequest, shared_dir: Path) -> Tokenizer:
    folder = shared_dir / "data" / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"needs the tokenizers of real models in {folder}")
    return REAL[request.param](folder)


def library(decoder: Any, words: Sequence[str]) -> Tokenizer:
    tokenizer = RustLibrary(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<end>"])
    return RustTokenizer(tokenizer, Path("nowhere"))


MADE: dict[str, Tokenizer] = {
    "characters": CharLevelTokenizer(),
    "word pieces": library(decoders.WordPiece(), ["we", "##s", "##ing", "do", ".", "'", ",", "n't"]),
    "ends of words": library(decoders.BPEDecoder(suffix="</w>"), ["we</w>", "s", "ing</w>", "do", ".</w>"]),
    "metaspace": library(decoders.Metaspace(), ["\u2581we", "s", "\u2581", "\u2581\u2581", "ing"]),
    "stripped": library(
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        ["\u2581we", "s", "\u2581", *(f"<0x{byte:02X}>" for byte in (0x41, 0xE2, 0x82, 0xAC, 0xF0, 0x0A))],
    ),
}


@pytest.fixture(scope="module", params=list(MADE))
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return MADE[request.param]


def check(tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    """Every piece is right when it is shown, and all of them are the text."""
    stream, shown = TextStream(tokenizer), ""
    whole = tokenizer.decode(tokens)
    for token in tokens:
        shown += stream.push(token)
        assert whole.startswith(shown), tokens
    assert shown + stream.finish() == whole, tokens


def random_tokens(tokenizer: Tokenizer, generator: random.Random, count: int) -> list[int]:
    """Any tokens of the vocabulary, now and then many that are special, single bytes or parts of characters."""
    odd = [*range(min(300, tokenizer.vocab_size)), *range(max(0, tokenizer.vocab_size - 30), tokenizer.vocab_size)]
    share = generator.choice([0.0, 0.5, 1.0])
    return [generator.choice(odd) if generator.random() < share else generator.randrange(tokenizer.vocab_size) for _ in range(count)]


def test_pieces_of_real_text_join_to_it(real: Tokenizer) -> None:
    tokens = real.encode(SAID * 4)
    check(real, tokens)
    for start in range(1, 30):
        check(real, tokens[start : start + 60])


def test_pieces_of_any_tokens_join_to_their_text(real: Tokenizer) -> None:
    generator = random.Random(5)
    for _ in range(150):
        check(real, random_tokens(real, generator, generator.choice([1, 3, 30, 90])))


def test_pieces_of_any_tokens_of_other_kinds_join_to_their_text(made: Tokenizer) -> None:
    generator = random.Random(7)
    for _ in range(400):
        check(made, [generator.randrange(made.vocab_size) for _ in range(generator.choice([1, 2, 5, 40, 120]))])


IN_BETWEEN = [0xF0, 0x9F, *[300] * 30, 0x98, 0x80]
"""A character with tokens in it that stand for nothing."""


@pytest.mark.parametrize(
    "bytes_", [[0x61] * 20 + IN_BETWEEN * 3, [0x80] * 200, [0xF0, 0x9F, 0x98, 0x80] * 60, [0xE2, 0x82] * 90, [0xC3, 0xA9, 0xFF] * 70]
)
def test_broken_characters_are_shown_as_such(bytes_: list[int]) -> None:
    check(CharLevelTokenizer(), bytes_)


def test_pieces_end_where_characters_do() -> None:
    stream = TextStream(CharLevelTokenizer())
    assert [stream.push(byte) for byte in "a\u00e9\u20ac".encode()] == ["a", "", "\u00e9", "", "", "\u20ac"]
    assert stream.finish() == ""


def test_the_start_of_a_character_at_the_very_end_is_shown_as_such() -> None:
    stream = TextStream(CharLevelTokenizer())
    assert [stream.push(byte) for byte in "a\u00e9".encode()[:2]] == ["a", ""]
    assert stream.finish() == INCOMPLETE


def test_text_is_shown_as_it_comes(real: Tokenizer) -> None:
    """Not only at the end: of plain words, every token shows something at once."""
    tokens = real.encode("The union of the people and the state of the nation, as they were in the beginning.")
    stream = TextStream(real)
    assert all(stream.push(token) for token in tokens)


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.decoded, self.longest = tokenizer, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        self.longest = max(self.longest, len(ids))
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("text", [SAID, "The state of the Union. "], ids=["any characters", "words"])
def test_a_token_costs_the_same_in_a_long_text(real: Tokenizer, text: str) -> None:
    tokens = real.encode(text * 400)[:2000]
    assert len(tokens) == 2000
    counts = {}
    for length in (64, 2000):
        counting: Any = CountingTokenizer(real)
        stream = TextStream(counting)
        for token in tokens[:length]:
            stream.push(token)
        counts[length] = counting.decoded / length
        assert counting.longest <= 4 * LONGEST
    assert counts[2000] <= 1.5 * counts[64]


def stopped(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    """(what is shown, whether it ended at a stop string)."""
    strings = StopStrings(stops)
    shown = "".join([strings.push(piece) for piece in pieces])
    return shown + strings.finish(), strings.found


def definition(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """The text, character by character, until a stop string is complete."""
    for end in range(1, len(text) + 1):
        ends = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: min(ends)], True
    return text, False


def test_stop_strings_by_their_definition_however_the_text_is_cut() -> None:
    generator = random.Random(3)
    for _ in range(3000):
        text = "".join(generator.choices("ab\n", k=generator.randrange(12)))
        stops = ["".join(generator.choices("ab\n", k=generator.randrange(1, 5))) for _ in range(generator.randrange(3))]
        cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randrange(6)))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert stopped(stops, pieces) == definition(stops, text), (stops, pieces)


def test_no_part_of_a_stop_string_is_shown() -> None:
    strings = StopStrings(["\n\nQ:"])
    assert [strings.push(piece) for piece in ("Yes.", "\n", "\nQ", ": Who")] == ["Yes.", "", "", ""]
    assert (strings.found, strings.push("more"), strings.finish()) == (True, "", "")


def test_what_turns_out_to_be_no_stop_string_is_shown() -> None:
    strings = StopStrings(["\n\nQ:"])
    assert [strings.push(piece) for piece in ("Yes.\n", "\nQ", "u")] == ["Yes.", "", "\n\nQu"]
    assert (strings.push("\n"), strings.finish(), strings.found) == ("", "\n", False)
