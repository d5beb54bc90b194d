"""A command line's failures: sentences for the user's mistakes, tracebacks for ours."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.section import ConfigError
from megatron.data.indexed import DatasetError
from megatron.script import exit_status


def failing(error: BaseException) -> int:
    def work() -> None:
        raise error

    return exit_status(work)


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "7000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, None), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_leave_the_cores_to_others(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], spins: str | None) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test ends
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []
    exit_status(lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    assert seen == [spins]


@pytest.mark.parametrize("command", ["train.py", "generate.py", "eval.py", "tools/serve.py"])
def test_a_command_says_so_before_pytorch_is_loaded(command: str, repository: Path) -> None:
    """OpenMP asks once, when PyTorch loads it."""
    program = f"""
import builtins, os, runpy, sys
loaded = builtins.__import__
def watch(name, *rest, **more):
    if name.split(".")[0] == "torch":
        print("torch", os.environ.get("GOMP_SPINCOUNT"))
        os._exit(0)
    return loaded(name, *rest, **more)
builtins.__import__ = watch
sys.argv = ["{command}", "-d", "configs", "quickstart.yml"]
sys.path.insert(0, os.path.dirname("{command}") or ".")
runpy.run_path("{command}", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=repository, env=environment)
    assert done.stdout.splitlines()[-1:] == ["torch 7000"], done.stderr


def test_success_is_0() -> None:
    assert exit_status(lambda: None) == 0


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (ConfigError(["'x' is wrong"]), 2, "1 problem(s) in the configuration:\n  'x' is wrong\n"),
        (DatasetError("a.bin is missing"), 1, "a.bin is missing\n"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "metrics.jsonl"), 1, "metrics.jsonl: Permission denied.\n"),
        (OSError("[Errno of nobody]"), 1, "The system: [Errno of nobody].\n"),
        (MemoryError(), 1, "There is not enough memory: use a smaller model, a smaller micro-batch or a shorter seq_length.\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
    ],
)
def test_the_users_mistakes_are_sentences(error: BaseException, status: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == status
    assert capsys.readouterr().err == sentence


def test_other_processes_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    failing(DatasetError("a.bin is missing"))
    assert capsys.readouterr().err == "[process 3] a.bin is missing\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_a_reader_that_leaves_is_no_complaint() -> None:
    program = "import sys\nfrom megatron.script import exit_status\nsys.exit(exit_status(lambda: print('line\\n' * 100_000, flush=True)))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, b"")
    process.stderr.close()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), OSError(errno.EROFS, "Read-only file system", "metrics.jsonl")]
)
def test_a_failure_of_the_disk_names_the_disk(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == 1
    assert re.fullmatch(rf"metrics\.jsonl: {error.strerror} \(disk /.*, [\d.]+ \w+ free\)\.\n", capsys.readouterr().err)


def test_another_process_that_ended_is_no_bug_of_this_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "2")
    words = "[/nowhere/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:16276: Connection reset by peer. This is typically ..."
    assert failing(RuntimeError(words)) == 1
    assert capsys.readouterr().err == "[process 2] The connection to another process of this run was lost, because that process has ended.\n"


def test_memory_that_pytorch_does_not_get_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert exit_status(lambda: torch.empty(1 << 60, dtype=torch.uint8).numel()) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "There is not enough memory: use a smaller model, a smaller micro-batch or a shorter seq_length (you tried to allocate 1152"
    )
    assert error.count("\n") == 1
