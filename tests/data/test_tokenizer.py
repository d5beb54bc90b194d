"""Tokenizers: round trips, the end-of-document id, and a sentence when one cannot be had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron.data.tokenizer import TokenizerError, build_tokenizer, load_tokenizer

TEXTS = ["", "Fellow-Citizens of the Senate", "naïve — ½ of 日本", "\n\n  x\t\r\n"]


def save_tokenizer(path: Path, *special: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_characters_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("CharLevelTokenizer", None)
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "b"]) == [ids, [98]]
    assert (tokenizer.vocab_size, tokenizer.eod) == (512, 0)
    assert tokenizer.decode([104, 0, 511, 105]) == "hi"


@pytest.mark.parametrize(
    ("special", "eod"),
    [([], None), (["<|endoftext|>"], 3), (["</s>"], 3), (["<|end_of_text|>"], 3), (["</s>", "<|endoftext|>"], 4), (["<pad>"], None)],
)
def test_end_of_document_is_found_by_its_usual_names(tmp_path: Path, special: list[str], eod: int | None) -> None:
    tokenizer = load_tokenizer("HFTokenizer", save_tokenizer(tmp_path / "tokenizer.json", *special))
    assert tokenizer.eod == eod
    assert tokenizer.vocab_size == 3 + len(special)
    assert tokenizer.encode_batch(["a b", "b"]) == [tokenizer.encode("a b"), [1]] == [[0, 1], [1]]
    assert tokenizer.decode([1, 0]) == "b a"


def test_the_config_chooses(tmp_path: Path, data_config: Callable[..., Any]) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")
    assert build_tokenizer(data_config(tokenizer_type="HFTokenizer", vocab_file=str(path))).vocab_size == 3
    assert build_tokenizer(data_config(tokenizer_type="CharLevelTokenizer")).vocab_size == 512


def test_missing_and_broken_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"HFTokenizer needs vocab_file: the path of a tokenizer\.json"):
        load_tokenizer("HFTokenizer", None)
    with pytest.raises(TokenizerError, match=r"vocab_file: no file .*none\.json; give the path"):
        load_tokenizer("HFTokenizer", tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    for content in ("", "{", '{"model": 3}'):
        broken.write_text(content)
        with pytest.raises(TokenizerError, match=r"broken\.json is not a tokenizer\.json of the tokenizers library"):
            load_tokenizer("HFTokenizer", broken)
    with pytest.raises(TokenizerError, match="'SPMTokenizer' is not one of those there are: HFTokenizer, CharLevelTokenizer"):
        load_tokenizer("SPMTokenizer", None)


def test_the_20b_tokenizer(shared_dir: Path) -> None:
    path = shared_dir / "data" / "tokenizers" / "20B_tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer("HFTokenizer", path)
    assert (tokenizer.vocab_size, tokenizer.eod) == (50277, 0)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")
    code = (
        "import sys; from megatron.data.tokenizer import load_tokenizer; "
        f"load_tokenizer('HFTokenizer', {str(path)!r}); sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=False).returncode == 0
