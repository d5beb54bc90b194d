"""What a tokenizer cannot give back of a text is counted and said, or an error; what its rules change is not lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.preprocessing.chat import ChatTask, chat_job
from megatron.data.preprocessing.encode import TextTask
from megatron.data.preprocessing.prepare import PrepareOptions, prepare
from megatron.data.preprocessing.preprocess import PreprocessOptions, Summary, preprocess, text_job
from megatron.data.progress import LineReporter
from megatron.data.tokenizer import Tokenizer as OurTokenizer
from megatron.data.tokenizer import TokenizerError, load_tokenizer
from megatron.data.tokenizer.gpt2 import read_gpt2
from megatron.data.tokenizer.lost import LossFinder

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxy\u0120\u010a.TP")}
REPORTER = LineReporter(Console(file=StringIO()))


def gpt2(folder: Path) -> tuple[Path, Path]:
    """GPT-2's files without a z."""
    (folder / "vocab.json").write_text(json.dumps({**LETTERS, "<|endoftext|>": len(LETTERS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n".replace("t h\n", ""))
    return folder / "vocab.json", folder / "merges.txt"


def saved(tokenizer: Tokenizer, folder: Path) -> OurTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer("HFTokenizer", folder / "tokenizer.json")


def from_gpt2(folder: Path) -> OurTokenizer:
    return load_tokenizer("GPT2BPETokenizer", *gpt2(folder))


def byte_level(folder: Path) -> OurTokenizer:
    return saved(read_gpt2(*gpt2(folder)), folder)


def letters(folder: Path) -> OurTokenizer:
    """Neither bytes nor a token for the unknown: what is not in the vocabulary is dropped."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxy .\n")}, []))
    tokenizer.decoder = decoders.Fuse()
    return saved(tokenizer, folder)


def unigram(folder: Path) -> OurTokenizer:
    vocabulary = [("<unk>", 0.0), *((letter, -3.0) for letter in "\u2581abcdefghijklmnopqrstuvwxy")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return saved(tokenizer, folder)


def words(folder: Path) -> OurTokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "lay": 1, "dog": 2, "a": 3, "doe": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(tokenizer, folder)


def pieces(folder: Path) -> OurTokenizer:
    lines = ["a lay dog", "the boys quick jump over my fox with wavy"] * 20
    prefix = str(folder / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=40, minloglevel=2, hard_vocab_limit=False, character_coverage=1.0
    )
    return load_tokenizer("SPMTokenizer", folder / "m.model")


@pytest.mark.parametrize(
    ("make", "text", "lost"),
    [
        (from_gpt2, "a lazy dog. zz", {"z": 3}),
        (byte_level, "a lazy dog. zz", {"z": 3}),
        (byte_level, "caf\u00e9", {"\u00e9": 1}),
        (letters, "a lazy dog\u6771", {"z": 1, "\u6771": 1}),
        (unigram, "a lazy dog", {"z": 1}),
        (words, "a lazy dog", {"lazy": 1}),
        (pieces, "a lazy dog \u6771\u4eac", {"z": 1, "\u6771": 1, "\u4eac": 1}),
        (from_gpt2, "a lay dog.\nT", {}),
        (words, "a  lay\n\tdog ", {}),
        (pieces, "a  lay\ndog", {}),
    ],
)
def test_what_is_lost(make: Callable[[Path], OurTokenizer], text: str, lost: dict[str, int], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    assert LossFinder(tokenizer).find(text, tokenizer.encode(text)) == Counter(lost)


def test_rules_lose_nothing(tmp_path: Path) -> None:
    """Lower case, accents, compatible characters, white space and control characters: changed, not lost."""
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 0, **{letter: 2 * n + 1 for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz1")}}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split("", "isolated")])
    ours = saved(tokenizer, tmp_path)
    text = "\u00c9 A\tb\n \u2460 \ufb01 \u200b\u0000 e\u0301"
    finder = LossFinder(ours)
    assert not [character for character in text if ours.loses(character)]
    assert finder.find("A b", ours.encode("A b")) == Counter()
    for whole in ("CharLevelTokenizer",):
        assert not LossFinder(load_tokenizer(whole, None)).find(text, [])


def test_a_spelled_unknown_token_is_no_loss(tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    assert LossFinder(tokenizer).find("a [UNK]", tokenizer.encode("a [UNK]")) == Counter()


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer"])
def test_an_empty_vocabulary_is_said(kind: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    files = [tmp_path / "tokenizer.json"] if kind == "HFTokenizer" else [tmp_path / "vocab.json", tmp_path / "merges.txt"]
    with pytest.raises(TokenizerError, match="the vocabulary is empty"):
        load_tokenizer(kind, *files)


def test_a_tokenizer_that_cannot_encode_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}))
    with pytest.raises(TokenizerError, match=r"the tokenizer cannot encode a text \(.*\[UNK\].*\): its file lacks something"):
        load_tokenizer("HFTokenizer", tmp_path / "tokenizer.json").encode("b")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Summary]:
    """preprocess_data.py with GPT-2's files that have no z."""
    vocab, merges = gpt2(tmp_path)
    lines = ["a lay dog", "a lazy dog", "the boys", "zz the zoo"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def run(**options: Any) -> Summary:
        task = TextTask("GPT2BPETokenizer", str(vocab), str(merges), append_eod=True)
        given = PreprocessOptions(inputs=(str(tmp_path / "in.jsonl"),), keys=("text",), output_prefix=str(tmp_path / "out"), **options)
        return preprocess(text_job(task, ("text",)), given, REPORTER)

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_counts_or_ends(workers: int, run: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"in\.jsonl:2: the tokenizer has no tokens for 1 character \('z' 1 time\) of this text, so they would be"):
        run(workers=workers)
    assert not (tmp_path / "out_text_document.bin").exists()
    lines = run(on_error="skip", workers=workers).lines()
    where = ", ".join(f"{tmp_path / 'in.jsonl'}:{number}" for number in (2, 4))
    assert f"lost: the tokenizer has no tokens for 4 characters ('z' 4 times) of 2 documents: {where}" in lines
    assert len(IndexedDataset(tmp_path / "out_text_document")) == 4


def test_a_text_of_nothing_else_is_the_tokenizers_fault(run: Callable[..., Summary], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "zzz"}))
    with pytest.raises(DatasetError, match="the tokenizer has no token for any of the text in the input"):
        run(on_error="skip")


def test_prepare_counts_or_ends(tmp_path: Path) -> None:
    vocab, merges = gpt2(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"a la{'z' * (n == 3)}y dog"}) + "\n" for n in range(9)))
    options = {"inputs": (str(tmp_path / "texts.jsonl"),), "directory": str(tmp_path), "name": "mine", "tokenizer_type": "GPT2BPETokenizer"}
    options |= {"tokenizer_file": str(vocab), "merge_file": str(merges)}
    with pytest.raises(DatasetError, match=r"text 4 \(train\): the tokenizer has no tokens for 1 character \('z' 1 time\) of this text"):
        prepare(PrepareOptions(**options), REPORTER)  # type: ignore[arg-type]
    prepared = prepare(PrepareOptions(**options, on_error="skip"), REPORTER)  # type: ignore[arg-type]
    assert prepared.left_out == ("lost: the tokenizer has no tokens for 1 character ('z' 1 time) of 1 document: text 4 (train)",)


def test_chats_count_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    letters(tmp_path / "model")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversation": chat}))
    job = chat_job(ChatTask(tokenizer_path=str(tmp_path / "model")), ("conversation",), None, binary_reward=False)
    options = {"inputs": (str(tmp_path / "in.jsonl"),), "keys": ("conversation",), "output_prefix": str(tmp_path / "out")}
    with pytest.raises(DatasetError, match=r"in\.jsonl:1: the tokenizer has no tokens for 1 character \('z' 1 time\)"):
        preprocess(job, PreprocessOptions(**options), REPORTER)  # type: ignore[arg-type]
    summary = preprocess(job, PreprocessOptions(**options, on_error="skip"), REPORTER)  # type: ignore[arg-type]
    assert summary.left_out[0].startswith("lost: the tokenizer has no tokens for 1 character ('z' 1 time) of 1 document: ")
