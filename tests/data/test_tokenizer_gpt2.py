"""GPT-2's tokenizers against OpenAI's implementation (tiktoken) and Hugging Face's, on real and on hard text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tests.data.tokenizer_texts import HARD, gpt2_files, random_texts, real_texts

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def files(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return gpt2_files(shared_dir, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def neox(files: tuple[Path, Path]) -> Tokenizer:
    return load_tokenizer("GPT2BPETokenizer", *files)


@pytest.fixture(scope="module")
def openai(files: tuple[Path, Path]) -> Any:
    """tiktoken's encoder over the same entries."""
    tiktoken = pytest.importorskip("tiktoken")
    vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in byte_of.values())}
    ranks = {bytes(byte_of[symbol] for symbol in entry): number for entry, number in vocabulary.items() if entry != "<|endoftext|>"}
    return tiktoken.Encoding("gpt2-of-the-test", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def test_ids_are_those_of_openais_encoder(neox: Tokenizer, openai: Any, shared_dir: Path) -> None:
    assert (neox.vocab_size, neox.eod) == (50257, 50256)
    texts = [*HARD, *random_texts(0, 1500), *real_texts(shared_dir)]
    expected = [openai.encode_ordinary(text) for text in texts]
    assert neox.encode_batch(texts) == expected
    assert [neox.encode(text) for text in texts[:200]] == expected[:200]
    assert [neox.decode(ids) for ids in expected] == texts


def test_a_spelled_out_special_token_stays_text_for_neox_and_not_for_hugging_face(neox: Tokenizer, files: tuple[Path, Path]) -> None:
    assert 50256 not in neox.encode("a <|endoftext|> b")
    assert neox.decode([64, 50256, 275]) == "a b"
    hf = load_tokenizer("HFGPT2Tokenizer", files[0].parent)
    assert hf.encode("a<|endoftext|> b<|padding|>") == [64, 50256, 275, 50257]
    assert (hf.vocab_size, hf.eod) == (50258, 50256)
    assert hf.decode([64, 50256, 275, 50257]) == "a b"


def test_hugging_faces_class_agrees(files: tuple[Path, Path], shared_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(files[0].parent)
    theirs.add_special_tokens({"pad_token": "<|padding|>"})
    texts = [*HARD, *random_texts(1, 300), *real_texts(shared_dir)[::8]]
    ours = load_tokenizer("HFGPT2Tokenizer", files[0].parent)
    assert (ours.vocab_size, ours.eod) == (len(theirs), theirs.eos_token_id)
    assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
    theirs.save_pretrained(tmp_path)  # the other layout: a tokenizer.json
    shutil.copy(files[0], tmp_path / "vocab.json")
    from_json = load_tokenizer("HFGPT2Tokenizer", tmp_path)
    assert from_json.encode_batch(texts) == ours.encode_batch(texts)
    assert (from_json.vocab_size, from_json.eod) == (50258, 50256)


def test_files_that_are_not_gpt2s_are_explained(files: tuple[Path, Path], shared_dir: Path, tmp_path: Path) -> None:
    vocab, merges = files
    with pytest.raises(
        TokenizerError, match=r"GPT2BPETokenizer needs vocab_file: the path of GPT-2's vocab\.json; a tokenizer\.json is read by HFTokenizer"
    ):
        load_tokenizer("GPT2BPETokenizer", None, merges)
    with pytest.raises(TokenizerError, match=r"GPT2BPETokenizer needs merge_file: the path of GPT-2's merges\.txt"):
        load_tokenizer("GPT2BPETokenizer", vocab)
    with pytest.raises(TokenizerError, match=r"merge_file: no file .*none\.txt; give the path of GPT-2's merges\.txt"):
        load_tokenizer("GPT2BPETokenizer", vocab, tmp_path / "none.txt")
    broken = tmp_path / "broken.json"
    for content in ("", "{", "[1]", '{"a": "b"}', '{"a": 0}'):
        broken.write_text(content)
        with pytest.raises(
            TokenizerError, match=r"broken\.json and .* are not GPT-2's vocab\.json \(entry: id\) and merges\.txt \(a pair a line\): "
        ):
            load_tokenizer("GPT2BPETokenizer", broken, merges)
    whole = shared_dir / "data" / "tokenizers" / "20B_tokenizer.json"
    with pytest.raises(TokenizerError, match=r"It is a tokenizer\.json: tokenizer_type HFTokenizer reads it"):
        load_tokenizer("GPT2BPETokenizer", whole, merges)


def test_a_merge_without_its_token_is_left_out_and_said(files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a copy of GPT-2's files that goes round, which GPT-NeoX reads as well."""
    vocab, merges = files
    ids = json.loads(vocab.read_text(encoding="utf-8"))
    whole = load_tokenizer("GPT2BPETokenizer", vocab, merges)
    assert not caplog.records
    last = "".join(merges.read_text(encoding="utf-8").split("\n")[-2].split())
    fewer = {token: number for token, number in ids.items() if token != last}
    (tmp_path / "vocab.json").write_text(json.dumps(fewer), encoding="utf-8")
    lacking = load_tokenizer("GPT2BPETokenizer", tmp_path / "vocab.json", merges)
    assert f"1 of the 50,000 merges in {merges} make a token that vocab.json does not have ({last}). These merges are left out." in caplog.text
    assert lacking.encode("on the hill") == whole.encode("on the hill")
    text = last.replace("\u0120", " ")
    assert len(lacking.encode(text)) > len(whole.encode(text)) == 1
    assert lacking.decode(lacking.encode(text)) == text
    (tmp_path / "vocab.json").write_text(json.dumps(dict(list(ids.items())[:40_000])), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"out of vocabulary"):
        load_tokenizer("GPT2BPETokenizer", tmp_path / "vocab.json", merges)


def test_names_on_the_hub_are_not_looked_for_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TokenizerError, match=r"without vocab_file means `gpt2` .* has not been downloaded. Give a folder .*, or write vocab_file: gpt2 to download"
    ):
        load_tokenizer("HFGPT2Tokenizer", None)
    with pytest.raises(
        TokenizerError,
        match=r"there is no folder gpt2\. It was not downloaded before, .* \(no network, HF_HUB_OFFLINE, or no "
        r"such name\)",
    ):
        load_tokenizer("HFGPT2Tokenizer", "gpt2")
    for path in ("./gpt2", "/no/such/folder", "data/gpt2/tokenizer.json"):
        with pytest.raises(TokenizerError, match=f"vocab_file: no folder {path}; HFGPT2Tokenizer takes a folder or a name"):
            load_tokenizer("HFGPT2Tokenizer", path)
    with pytest.raises(TokenizerError, match=r"is not a folder with a tokenizer\.json, or with vocab\.json and merges\.txt"):
        load_tokenizer("HFGPT2Tokenizer", tmp_path)


def test_a_name_downloaded_before_is_found(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layout of the hub's cache, as its own client writes it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text(snapshot.name)
    for path in files:
        shutil.copy(path, snapshot / path.name)
    for name in (None, "gpt2"):
        assert load_tokenizer("HFGPT2Tokenizer", name).vocab_size == 50258
