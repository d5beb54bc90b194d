"""What the environment of `make train` offers works in that environment: one is built of requirements/requirements.txt alone, without packages that
only tests or single options need (no protobuf, no tiktoken, no wandb). lm_eval, which is in it, brings datasets and pyarrow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.testing.tiny import TINY_DENSE, TINY_STRUCTMOE
from tests.training.runs import outer_environment

pytestmark = pytest.mark.slow
READY = "STRUCTMOE_RUN_ENVIRONMENT"
"""Environment variable that names such an environment, so that none has to be built."""
WORDS = "we hold these truths to be self evident that all men are created equal "
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": "we hold"}, {"role": "assistant", "content": "these truths"}]
MISTAKES = ("Traceback", "ModuleNotFoundError")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    if READY in os.environ:
        return Path(os.environ[READY]) / "bin" / "python"
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    requirements = repository / "requirements" / "requirements.txt"
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True, cwd=repository)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, with texts in several forms."""
    place = tmp_path_factory.mktemp("place")
    texts = [WORDS * 20 + str(number) for number in range(40)]
    (place / "texts").mkdir()
    for number, text in enumerate(texts):
        (place / "texts" / f"{number}.txt").write_text(text)
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (place / "chats.jsonl").write_text("".join(json.dumps({"conversation": CHAT}) + "\n" for _ in range(20)))
    return place


@pytest.fixture(scope="module")
def run(python: Path, place: Path, repository: Path) -> Run:
    """Runs a script of the repository in the environment; `status` is what it has to end with. No traceback, whatever that is."""

    def run(script: str, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
        environment = {key: value for key, value in outer_environment().items() if key not in hidden}
        command = [str(python), str(repository / script), *map(str, words)]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        assert not any(mistake in output for mistake in MISTAKES), output
        return done

    return run


@pytest.fixture(scope="module")
def data(run: Run, place: Path) -> Path:
    """A prepared corpus, with its own tokenizer."""
    run("prepare_data.py", "texts", "--name", "mine", "--vocab-size", 300, "--valid-fraction", 0.2, "--test-fraction", 0.1)
    return place / "data" / "mine"


@pytest.fixture(scope="module")
def pieces(python: Path, place: Path) -> dict[str, Path]:
    """SentencePiece models of both kinds."""
    train = (
        "import sentencepiece, sys\nfor kind in ('bpe', 'unigram'):\n    sentencepiece.SentencePieceTrainer.train("
        "sentence_iterator=iter([sys.argv[1]] * 9), model_prefix=kind, model_type=kind, vocab_size=60, hard_vocab_limit=False, minloglevel=2)"
    )
    subprocess.run([str(python), "-c", train, WORDS], cwd=place, check=True)
    return {kind: place / f"{kind}.model" for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def trained(run: Run, place: Path, repository: Path, data: Path, pieces: dict[str, Path]) -> Callable[..., Path]:
    """The folder of a run of a few steps. `kind`: bpe (our own vocabulary), a SentencePiece kind, or structmoe."""

    def train(kind: str) -> Path:
        save = place / f"run-{kind}"
        if save.exists():
            return save
        base = dict(TINY_STRUCTMOE if kind == "structmoe" else {**TINY_DENSE, "norm": "rmsnorm", "activation": "swiglu"})
        split = {name: str(data / f"{name}_text_document") for name in ("train", "valid", "test")}
        keys: dict[str, Any] = {**base, "seq_length": 32, "max_position_embeddings": 32, "train_iters": 3, "eval_interval": 2, "eval_iters": 1}
        keys |= {"save": str(save), "checkpoint_factor": 3, "tokenizer_type": "HFTokenizer", "vocab_file": str(data / "tokenizer.json")}
        if kind in pieces:
            run("tools/datasets/preprocess_data.py", "--input", "texts.jsonl", "--tokenizer-type", "SPMTokenizer", "--vocab-file", pieces[kind],
                "--append-eod", "--on-error", "skip", "--output-prefix", place / kind)  # fmt: skip
            split = dict.fromkeys(split, str(place / f"{kind}_text_document"))
            keys |= {"tokenizer_type": "SPMTokenizer", "vocab_file": str(pieces[kind])}
        keys |= {f"{name}_data_paths": [path] for name, path in split.items()}
        (place / f"{kind}.yml").write_text(json.dumps(keys))
        run("deepy.py", repository / "train.py", f"{kind}.yml", "--check")
        run("train.py", f"{kind}.yml")
        return save

    return train


def test_the_environment_lacks_what_it_is_meant_to_lack(python: Path) -> None:
    find = "import importlib.util as u; print([name for name in ('google', 'tiktoken', 'ftfy', 'wandb') if u.find_spec(name)])"
    assert subprocess.run([str(python), "-c", find], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_data_of_every_form(run: Run, place: Path, data: Path, pieces: dict[str, Path]) -> None:
    common = ["--input", "texts.jsonl", "--append-eod", "--output-prefix"]
    own = ["--tokenizer-type", "HFTokenizer", "--vocab-file", data / "tokenizer.json"]
    run("tools/datasets/preprocess_data.py", *common, "own", *own, "--workers", 2)
    run("tools/datasets/preprocess_data.py", *common, "bytes", "--tokenizer-type", "CharLevelTokenizer")
    run("tools/datasets/preprocess_data_with_mask.py", *common, "masked", *own, "--mask-before-token", "1,2")
    run("tools/datasets/dataset_token_count.py", "own_text_document", "bytes_text_document")
    run("prepare_data.py", "texts.jsonl", "--name", "pieces", "-t", "SPMTokenizer", "--tokenizer-file", pieces["unigram"], "--on-error", "skip")
    run("prepare_data.py", "stdlib", "--max-bytes", "200KB", "--vocab-size", 300)


def test_chats(run: Run, place: Path, data: Path) -> None:
    model = place / "chat-model"
    model.mkdir()
    content = json.loads((data / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run("tools/datasets/preprocess_data_with_chat_template.py", "--input", "chats.jsonl", "--tokenizer-path", model, "--output-prefix", "chats")
    assert (place / "chats_conversation_label_document.bin").stat().st_size > 0


@pytest.mark.parametrize("kind", ["bpe", "unigram", "structmoe", "own"])
def test_train_measure_generate_export_and_import(kind: str, run: Run, place: Path, trained: Callable[..., Path], pieces: dict[str, Path]) -> None:
    save = trained(kind)
    (place / "measured.txt").write_text(WORDS)
    run("eval.py", f"{kind}.yml", "-o", "eval_text_files=[measured.txt]")
    run("generate.py", f"{kind}.yml", "-o", "text_gen_type=unconditional", "-o", "maximum_tokens=5")
    run("tools/ckpts/inspect_checkpoints.py", save)
    run("tools/analysis/size.py", f"{kind}.yml")
    run("tools/ckpts/convert_neox_to_hf.py", "--input_dir", save, "--output_dir", place / f"hf-{kind}")
    settings = json.loads((place / f"hf-{kind}" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == ("</s>" if kind in pieces else "<|endoftext|>")
    run("tools/ckpts/inspect_checkpoints.py", place / f"hf-{kind}")
    run("tools/ckpts/convert_hf_to_neox.py", "--model_path", place / f"hf-{kind}", "--output_dir", place / f"back-{kind}")


def test_a_folder_with_a_sentence_piece_model_alone(run: Run, place: Path, trained: Callable[..., Path], pieces: dict[str, Path]) -> None:
    source = place / "hf-pieces-alone"
    run("tools/ckpts/convert_neox_to_hf.py", "--input_dir", trained("bpe"), "--output_dir", source)
    (source / "tokenizer.json").unlink()
    run("tools/ckpts/convert_hf_to_neox.py", "--model_path", source, "--output_dir", place / "alone")
    run("tools/ckpts/convert_neox_to_hf.py", "--input_dir", place / "alone", "--output_dir", place / "alone-back")
    assert (place / "alone-back" / "tokenizer.json").is_file()
    run("tools/ckpts/convert_hf_to_neox.py", "--model_path", source, "--output_dir", place / "more", "--add-tokens", "<tool>")


@pytest.mark.parametrize(
    ("script", "words", "package"),
    [
        ("prepare_data.py", ["texts.jsonl", "--name", "ranks", "-t", "TiktokenTokenizer", "--tokenizer-file", "cl100k_base"], "tiktoken"),
        (
            "tools/datasets/preprocess_data.py",
            ["--input", "texts.jsonl", "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "mended", "--ftfy"],
            "ftfy",
        ),
        ("train.py", ["own.yml", "-o", "use_wandb=true", "-o", "save=elsewhere"], "wandb"),
        ("train.py", ["own.yml", "-o", "use_comet=true", "-o", "save=elsewhere"], "comet_ml"),
        ("train.py", ["own.yml", "-o", "tensorboard_dir=board", "-o", "save=elsewhere"], "tensorboard"),
        ("train.py", ["own.yml", "-o", "use_bnb_optimizer=true", "-o", "optimizer.type=Adam", "-o", "save=elsewhere"], "bitsandbytes"),
    ],
)
def test_what_needs_another_package_names_it(script: str, words: list[str], package: str, run: Run, trained: Callable[..., Path]) -> None:
    """And the file that its version is pinned in."""
    if script == "train.py":
        trained("own")
    error = run(script, *words, status=1).stderr
    assert package in error
    assert "pip install" in error
    assert "requirements/requirements-" in error
