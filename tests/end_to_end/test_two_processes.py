"""`deepy.py` with two processes: train, stop, go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.runs import losses_of, outer_environment, run_values

REPOSITORY = Path(__file__).resolve().parents[2]


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "deepy.py"), "train.py", str(file)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=outer_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def write_run(folder: Path, values: dict[str, object]) -> Path:
    file = folder / "run.yml"
    file.write_text(json.dumps({**values, "num_gpus": 2, "zero_optimization": {"stage": 1}, "resume_if_exists": True}))
    return file


@pytest.mark.slow
def test_stopped_by_sigterm_and_continued(corpus: Path, tmp_path: Path) -> None:
    straight = run_values(corpus, tmp_path / "straight", train_iters=120, checkpoint_factor=1000, train_batch_size=4)
    output, _ = start(write_run(tmp_path, straight)).communicate(timeout=180)
    expected = losses_of(tmp_path / "straight/metrics.jsonl")
    assert len(expected) == 120, output

    file = write_run(tmp_path, {**straight, "save": str(tmp_path / "stopped")})
    process, metrics = start(file), tmp_path / "stopped/metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "SIGTERM received" in output
    assert "Traceback" not in output
    assert 0 < len(losses_of(metrics)) < 120
    output, _ = start(file).communicate(timeout=180)
    assert "Going on from" in output
    assert losses_of(metrics) == expected


def test_two_processes_train_and_share_the_cores(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=6, eval_iters=1, train_batch_size=4)
    process = start(write_run(tmp_path, values))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "2 replica(s) x 2 micro-batch x 1 accumulation steps" in output
    assert len(losses_of(tmp_path / "run/metrics.jsonl")) == 6


@pytest.mark.slow  # test_user_errors_are_sentences holds the sentence, test_a_mistake_in_the_data_is_an_error_on_every_process that all end
def test_a_mistake_is_one_sentence_from_one_process(corpus: Path, tmp_path: Path) -> None:
    values = run_values(tmp_path / "nothing", tmp_path / "run")
    process = start(write_run(tmp_path, values))
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert f"{tmp_path / 'nothing'}" in output
    assert "Traceback" not in output
