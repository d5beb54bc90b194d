"""Text prepared by GPT-NeoX's commands, trained on and read back, with the kinds of tokenizer that configurations name by one file and by two."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.tokenizer import load_tokenizer
from megatron.inference.continuation import Manner, Prompt, complete, encode_prompt
from megatron.inference.engine import Engine
from megatron.inference.model import load_ready_model
from megatron.inference.runner import build_runner
from megatron.inference.sampling import Sampling
from megatron.testing.tiny import TINY_DENSE, tiny_config
from tests.training.runs import train_losses
from tools.datasets import preprocess_data, preprocess_data_with_mask

SENTENCE = "Question: who are we? Answer: we are the people of the united states."


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{SENTENCE} {number}"}) + "\n" for number in range(80)))
    return path


def train_and_read_back(data: dict[str, Any], save: Path) -> None:
    run = {**TINY_DENSE, **data, "save": str(save), "checkpoint_factor": 3, "train_iters": 3, "eval_iters": 1}
    losses = train_losses(run)
    assert len(losses) == 3
    ready = load_ready_model(tiny_config(run))
    prompt = "we are"
    engine = Engine(ready, build_runner(ready), maximum_requests=1)
    (continued,) = complete(engine, [Prompt(prompt, encode_prompt(ready, prompt), 0)], Manner(Sampling(), 3, seed=0))
    assert (continued.context, continued.finished or continued.length == 3) == (prompt, True)
    assert ready.tokenizer.decode(ready.tokenizer.encode(prompt)) == prompt


def test_gpt2_files(tmp_path: Path) -> None:
    train_bpe([SENTENCE * 4], 320, tmp_path / "t.json")
    Tokenizer.from_file(str(tmp_path / "t.json")).model.save(str(tmp_path))
    vocab, merges = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    given = ["--input", str(write_corpus(tmp_path)), "--tokenizer-type", "GPT2BPETokenizer", "--vocab", vocab, "--merge", merges, "--append-eod"]
    preprocess_data.main([*given, "--output-prefix", str(tmp_path / "mine")])
    keys = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": vocab, "merge_file": merges, "eod_mask_loss": True}
    train_and_read_back({**keys, "data_path": str(tmp_path / "mine_text_document"), "split": "80, 10, 10"}, tmp_path / "run")


def test_sentence_pieces_with_masked_questions(tmp_path: Path) -> None:
    model, path = io.BytesIO(), tmp_path / "tokenizer.model"
    options = {"vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([SENTENCE] * 20), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    pattern = load_tokenizer("SPMTokenizer", path).encode("Answer:")[-1]
    given = ["--input", str(write_corpus(tmp_path)), "--tokenizer-type", "SPMTokenizer", "--vocab-file", str(path), "--append-eod"]
    preprocess_data_with_mask.main([*given, "--mask-before-token", str(pattern), "--output-prefix", str(tmp_path / "qa")])
    text, labels = [str(tmp_path / "qa_text_document")], [str(tmp_path / "qa_label_document")]
    paths = {f"{part}_data_paths": text for part in ("train", "valid", "test")} | {
        f"{part}_label_data_paths": labels for part in ("train", "valid", "test")
    }
    train_and_read_back({**paths, "tokenizer_type": "SPMTokenizer", "vocab_file": str(path)}, tmp_path / "run")
