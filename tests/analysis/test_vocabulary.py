"""The vocabulary that `deepy.py --check` counts, for every kind of tokenizer that is a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.analysis.vocabulary import Vocabulary, vocabulary
from megatron.config.data import DataConfig


def test_bytes_need_no_file() -> None:
    assert vocabulary(DataConfig(tokenizer_type="CharLevelTokenizer")) == Vocabulary(512, "")


def test_gpt2s_two_files(tmp_path: Path) -> None:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    merges.write_text("#version: 0.2\na b\n")
    assert vocabulary(DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))) == Vocabulary(4, "")
    missing = vocabulary(DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab)))
    assert missing.size is None
    assert "needs merge_file" in missing.reason


def test_a_vocabulary_with_the_word_model_is_no_tokenizer_json(tmp_path: Path) -> None:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"model": 0, "a": 1}))
    merges.write_text("#version: 0.2\na b\n")
    reason = vocabulary(DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))).reason
    assert "are not GPT-2's vocab.json" in reason
    assert "HFTokenizer" not in reason


@pytest.mark.parametrize("kind", ["HFTokenizer", "SPMTokenizer", "TiktokenTokenizer", "HFGPT2Tokenizer"])
def test_a_file_that_is_not_there_is_not_looked_for_elsewhere(kind: str) -> None:
    data = DataConfig.model_validate({"tokenizer_type": kind, "vocab_file": "nowhere/at-all"})
    assert vocabulary(data) == Vocabulary(None, "vocab_file 'nowhere/at-all' does not exist yet")
    assert vocabulary(DataConfig.model_validate({"tokenizer_type": kind})) == Vocabulary(None, "vocab_file is not given")


def test_the_published_tokenizers(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "tokenizers"
    llama = DataConfig(tokenizer_type="SPMTokenizer", vocab_file=str(folder / "llama2_tokenizer.model"))
    llama_3 = DataConfig(tokenizer_type="TiktokenTokenizer", vocab_file=str(folder / "llama3_tokenizer.model"))
    assert [vocabulary(llama).size, vocabulary(llama_3).size] == [32_000, 128_256]
