"""generate.py and eval.py as processes: what they print, where they write, how they fail."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import IndexedDatasetWriter, token_dtype
from megatron.testing.tiny import TINY_STRUCTMOE
from tests.scripts import run_script
from tests.training.runs import outer_environment

Write = Callable[[Mapping[str, Any]], Path]


@pytest.fixture
def run(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the repository in `tmp_path`."""

    def start(script: str, *words: object, rank: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**outer_environment(), "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        environment |= {} if rank is None else place
        if not options and script != "deepy.py":
            return run_script(script, *map(str, words), folder=tmp_path, environment=environment, timeout=120)
        command = [sys.executable, str(repository / script), *map(str, words)]
        options = {"stdin": subprocess.DEVNULL, **options}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False, **options)

    return start


def test_deepy_generates_from_a_file(run: Any, repository: Path, checkpoint: dict[str, Any], yaml_file: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One\nTwo\n")
    arguments = [
        repository / "generate.py",
        yaml_file(checkpoint),
        "-i",
        "prompts.txt",
        "--sample_output_file",
        "out.jsonl",
        "-o",
        "maximum_tokens=4",
    ]
    finished = run("deepy.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert [json.loads(line)["context"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["One", "Two"]
    assert "2 sample(s) written to out.jsonl." in finished.stdout
    assert "[2/2]" in finished.stdout


def test_eval_measures_a_file(run: Any, checkpoint: dict[str, Any], yaml_file: Write, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The state of the Union is strong.")
    finished = run("eval.py", yaml_file(checkpoint), "-o", "eval_text_files=[text.txt]", "--eval_results_prefix", "tiny")
    assert finished.returncode == 0, finished.stderr
    (path,) = tmp_path.glob("tiny_eval_results_*.json")
    score = json.loads(path.read_text())["results"]["text.txt"]
    assert f"{score['bits_per_byte']:.4f}" in finished.stdout
    assert f"Results written to {path.name}." in finished.stdout
    assert f"{checkpoint['load']}/global_step2, step 2, float32 on cpu." in finished.stdout
    assert "Windows of 32 tokens that move by 16." in finished.stdout
    assert "the first token is predicted from the end-of-document token" in finished.stdout


def test_at_a_terminal_a_conversation_begins(run: Any, checkpoint: dict[str, Any], yaml_file: Write) -> None:
    master, slave = pty.openpty()
    os.write(master, b"The Union\n/quit\n")
    finished = run("generate.py", yaml_file(checkpoint), "-o", "maximum_tokens=4", stdin=slave)
    os.close(master), os.close(slave)
    assert finished.returncode == 0, finished.stderr
    assert "Write a prompt; /quit, Ctrl-D or Ctrl-C to end." in finished.stdout
    assert finished.stdout.endswith("Bye.\n")


@pytest.mark.parametrize(
    ("case", "status", "sentence"),
    [
        (("generate.py", {"load": "nowhere"}), 1, "nowhere does not exist, so there is no checkpoint to load."),
        (("eval.py", {}), 2, "'eval_text_files' must be given"),
    ],
)
def test_mistakes_get_a_sentence(
    run: Any, checkpoint: dict[str, Any], yaml_file: Write, case: tuple[str, dict[str, Any]], status: int, sentence: str
) -> None:
    script, changes = case
    finished = run(script, yaml_file({**checkpoint, **changes}))
    assert finished.returncode == status
    assert sentence in finished.stderr
    assert "Traceback" not in finished.stderr


def test_only_the_first_of_several_processes_works(run: Any, yaml_file: Write, checkpoint: dict[str, Any]) -> None:
    for script in ("generate.py", "eval.py"):
        finished = run(script, yaml_file(checkpoint), rank="1")
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def train_tokens(path: Path, documents: Sequence[bytes]) -> None:
    with IndexedDatasetWriter(path, token_dtype(512)) as writer:
        for document in documents:
            writer.add([*document, 0])


def test_what_was_trained_is_generated_from_and_measured(run: Any, yaml_file: Write, tmp_path: Path) -> None:
    """Two letters over and over is learned in a few steps; its text then costs little and its continuation is more of it."""
    train_tokens(tmp_path / "text", [b"ab" * 400] * 4)
    (tmp_path / "text.txt").write_text("ab" * 100)
    keys = {
        **TINY_STRUCTMOE,
        "tokenizer_type": "CharLevelTokenizer",
        "data_path": "text",
        "split": "1,0,0",
        "train_iters": 30,
        "eval_interval": 100,
        "save": "run",
        "checkpoint_factor": 100,
        "threads_per_process": 1,
        "maximum_tokens": 6,
        "eval_text_files": ["text.txt"],
    }
    (tmp_path / "prompts.txt").write_text("ababa\n")
    config = yaml_file(keys)
    trained = run("train.py", config)
    assert trained.returncode == 0, trained.stderr
    assert run("generate.py", config, "-i", "prompts.txt").returncode == 0
    assert json.loads((tmp_path / "samples.txt").read_text())["text"] == "bababa"
    assert run("eval.py", config).returncode == 0
    (path,) = tmp_path.glob("eval_results_*.json")
    assert json.loads(path.read_text())["results"]["text.txt"]["bits_per_byte"] < 1.5
