"""TiktokenTokenizer on Llama 3's file, against a BPE of the `tokenizers` library with the merges worked out from the ranks; encodings by name."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from megatron.data.tokenizer.tiktoken_ranks import pieces
from tests.data.tokenizer_texts import HARD, gpt2_files, random_texts, real_texts

ROOT = Path(__file__).resolve().parents[2]
tiktoken = pytest.importorskip("tiktoken")
# As published in Meta's tokenizer for Llama 3.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def path(shared_dir: Path) -> Path:
    path = shared_dir / "data" / "tokenizers" / "llama3_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def llama3(path: Path) -> Tokenizer:
    return load_tokenizer("TiktokenTokenizer", path)


@pytest.fixture(scope="module")
def by_merges(path: Path) -> RustTokenizer:
    """Every way to put an entry together from two others, best entry first: what a rank file means to a library that knows merges."""
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines()}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbol = {chr(byte): chr(byte) for byte in visible} | {chr(byte): chr(256 + number) for number, byte in enumerate(hidden)}
    table = str.maketrans(symbol)
    names = {token: token.decode("latin-1").translate(table) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:cut]], names[token[:cut]], names[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [(left, right) for *_, left, right in merges], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def test_ids_are_those_of_the_merges(llama3: Tokenizer, by_merges: RustTokenizer, shared_dir: Path) -> None:
    texts = [*HARD, *random_texts(4, 1000), *real_texts(shared_dir)]
    expected = [encoding.ids for encoding in by_merges.encode_batch_fast(texts)]
    assert llama3.encode_batch(texts) == expected
    assert [llama3.encode(text) for text in texts[:100]] == expected[:100]
    assert [llama3.decode(ids) for ids in expected] == texts


def test_its_size_its_end_and_its_special_ids(llama3: Tokenizer) -> None:
    assert (llama3.vocab_size, llama3.eod) == (128_256, 128_001)
    assert llama3.encode("Hello world!") == [9906, 1917, 0]
    assert llama3.decode([128_000, 9906, 1917, 128_009, 128_255]) == "Hello world"
    assert max(llama3.encode("<|end_of_text|><|begin_of_text|>")) < 128_000


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 60_000, "=" * 25_001, "\n" * 25_000 + "x" * 25_001 + " " * 3, "ab 1\n" * 100_000])
def test_very_long_runs_come_back(llama3: Tokenizer, text: str) -> None:
    assert llama3.decode(llama3.encode(text)) == text


def test_long_text_is_cut_as_metas_tokenizer_cuts_it() -> None:
    words = "word and " * 10_000
    assert list(pieces(words)) == [words]
    assert list(pieces("")) == []
    assert [len(piece) for piece in pieces("x" * 60_000)] == [25_000, 25_000, 10_000]
    assert [len(piece) for piece in pieces("x" * 25_000 + " y")] == [25_002]
    assert [len(piece) for piece in pieces("a " + "x" * 25_001 + " y" + " " * 50_000)] == [25_002, 1 + 2 + 25_000, 25_000]
    assert [len(piece) for piece in pieces("ab " * 150_000)] == [400_000, 50_000]


def test_files_of_other_kinds_are_explained(path: Path, shared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"TiktokenTokenizer needs vocab_file: the name of an encoding \(cl100k_base\) or the path of Llama 3's file"
    ):
        load_tokenizer("TiktokenTokenizer", None)
    with pytest.raises(
        TokenizerError, match=r"line 1 of .*llama2_tokenizer\.model is not `base64 rank`.* a SentencePiece model is read by SPMTokenizer"
    ):
        load_tokenizer("TiktokenTokenizer", shared_dir / "data" / "tokenizers" / "llama2_tokenizer.model")
    lines = path.read_bytes().splitlines(keepends=True)
    short = tmp_path / "short.model"
    for content, count in ((b"", "0"), (b"".join(lines[:5000]), "5,000"), (b"".join(lines) + b"eHh4eHh4eHh4eHg= 128000\n", "128,001")):
        short.write_bytes(content)
        with pytest.raises(TokenizerError, match=f"short.model holds {count} ranks. A tiktoken file does not say how text is cut"):
            load_tokenizer("TiktokenTokenizer", short)
    short.write_bytes(b"".join(lines[:100]) + b"IQ")
    with pytest.raises(TokenizerError, match=r"line 101 of .*short\.model is not `base64 rank`"):
        load_tokenizer("TiktokenTokenizer", short)


def test_names_that_cannot_be_had_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"'no_such_file' is neither a file nor an encoding of tiktoken \(.*cl100k_base.*\)"):
        load_tokenizer("TiktokenTokenizer", "no_such_file")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(TokenizerError, match=r"tiktoken could not download cl100k_base \(ProxyError\); without a network, set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("TiktokenTokenizer", "cl100k_base")


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match=r"TiktokenTokenizer needs the package tiktoken: `pip install tiktoken`"):
        load_tokenizer("TiktokenTokenizer", path)


PLUGIN = """
import base64, json
def mine():
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in visible)}
    entries = json.load(open(VOCABULARY))
    ranks = {bytes(byte_of[symbol] for symbol in entry): number for entry, number in entries.items() if number != 50256}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
    return {"name": "mine", "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 50256, "<|other|>": 50300}}
ENCODING_CONSTRUCTORS = {"mine": mine}
"""
PROGRAM = """
import sys
from megatron.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer("TiktokenTokenizer", "mine")
text = "It's <|endoftext|> text\\n\\n 😀"
ids = tokenizer.encode(text)
assert ids == load_tokenizer("GPT2BPETokenizer", sys.argv[1], sys.argv[2]).encode(text), ids
assert (tokenizer.vocab_size, tokenizer.eod) == (50301, 50256)
assert tokenizer.decode([*ids, 50256, 50300, 50280]) == text
"""


def test_an_encoding_by_its_name(shared_dir: Path, tmp_path: Path) -> None:
    """An encoding that tiktoken learns from a plug-in (its own are downloads): GPT-2's entries, with gaps between the special ids."""
    vocab, merges = gpt2_files(shared_dir, tmp_path)
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "mine.py").write_text(PLUGIN.replace("VOCABULARY", repr(str(vocab))))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", PROGRAM, str(vocab), str(merges)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
