"""Tokenizers: round trips, the end-of-document id, and a sentence when one cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron.data.tokenizer import TYPES, TokenizerError, build_tokenizer, end_of_document, load_tokenizer

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
    [
        ([], None),
        (["<|endoftext|>"], 3),
        (["</s>"], 3),
        (["<|eot_id|>", "<|end_of_text|>"], 4),
        (["<pad>", "<eos>"], 4),
        (["</s>", "<|endoftext|>"], 4),
        (["<｜end▁of▁sentence｜>"], 3),
        (["<pad>"], None),
    ],
)
def test_end_of_document_is_found_by_its_usual_names(tmp_path: Path, special: list[str], eod: int | None) -> None:
    tokenizer = load_tokenizer("HFTokenizer", save_tokenizer(tmp_path / "tokenizer.json", *special))
    assert tokenizer.eod == eod
    assert tokenizer.vocab_size == 3 + len(special)
    assert tokenizer.encode_batch(["a b", "b"]) == [tokenizer.encode("a b"), [1]] == [[0, 1], [1]]
    assert tokenizer.decode([1, 0]) == "b a"


@pytest.mark.parametrize(
    ("config", "special", "eod"),
    [
        ({"eos_token": "<stop>"}, ["<stop>"], 3),
        ({"eos_token": {"content": "<stop>", "lstrip": False}}, ["</s>", "<stop>"], 4),
        ({"eos_token": "<|eot_id|>"}, ["<|eot_id|>", "<|end_of_text|>"], 4),  # an instruction model's: a turn ends there, not the text
        ({"eos_token": "<not there>"}, ["</s>"], 3),
        ({"eos_token": None}, [], None),
        ([1], [], None),
    ],
)
def test_the_tokenizer_config_beside_the_file_names_the_end(tmp_path: Path, config: Any, special: list[str], eod: int | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("HFTokenizer", save_tokenizer(tmp_path / "tokenizer.json", *special)).eod == eod


def test_no_end_of_document_is_said_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("not JSON")
    tokenizer = load_tokenizer("HFTokenizer", save_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"--append-eod needs a token that ends a document, and this tokenizer has none: no <\|endoftext\|>"):
        end_of_document(tokenizer, "--append-eod")
    assert end_of_document(load_tokenizer("CharLevelTokenizer", None), "--append-eod") == 0


def test_truncation_and_padding_in_the_file_do_not_cut_documents(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(save_tokenizer(tmp_path / "tokenizer.json", "<pad>")))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer("HFTokenizer", tmp_path / "tokenizer.json").encode_batch(["a b a b a", ""]) == [[0, 1, 0, 1, 0], []]


def test_ids_with_gaps_are_all_below_the_vocabularys_size(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    content = json.loads(path.read_text())
    content["model"]["vocab"]["b"] = 9
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer("HFTokenizer", path)
    assert max(*tokenizer.encode("b"), tokenizer.eod) < tokenizer.vocab_size == 10


def test_the_config_chooses(tmp_path: Path, data_config: Callable[..., Any]) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")
    assert build_tokenizer(data_config(tokenizer_type="HFTokenizer", vocab_file=str(path))).vocab_size == 3
    assert build_tokenizer(data_config(tokenizer_type="CharLevelTokenizer")).vocab_size == 512
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    keys = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    assert data_config().tokenizer_type == "GPT2BPETokenizer"
    assert build_tokenizer(data_config(**keys)).encode("abba") == [2, 1, 0]


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
    with pytest.raises(TokenizerError, match=r"vocab_file: .* is a folder; give the tokenizer\.json in it"):
        load_tokenizer("HFTokenizer", tmp_path)
    with pytest.raises(TokenizerError, match=f"'BertWordPiece' is unknown; the tokenizer types are: {', '.join(TYPES)}"):
        load_tokenizer("BertWordPiece", None)


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
