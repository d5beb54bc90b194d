"""Runs that are told to stop, or are killed, and started again: nothing is lost and no number changes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import REPOSITORY, ScriptProcess
from tests.training.runs import losses_of, outer_environment, run_values, train_losses

KEYS = ("train/lm_loss", "validation/lm_loss", "test/lm_loss")


def start(file: Path, interrupt: signal.Handlers = signal.SIG_DFL) -> ScriptProcess:
    return ScriptProcess("train.py", str(file), folder=file.parent, environment=outer_environment(), interrupt=interrupt)


class Run:
    """`python train.py` in a process of its own, which goes on where the last one was ended.

    `interpreter`: each time a new interpreter, which takes seconds longer.
    """

    def __init__(self, values: dict[str, Any], folder: Path, interpreter: bool = False) -> None:
        self.file = folder / "run.json"
        self.file.write_text(json.dumps({**values, "resume_if_exists": True}))
        self.metrics = Path(values["save"]) / "metrics.jsonl"
        self.interrupt = signal.SIG_DFL
        self.interpreter = interpreter

    def start(self) -> ScriptProcess | subprocess.Popen[str]:
        if not self.interpreter:
            return start(self.file, self.interrupt)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, str(REPOSITORY / "train.py"), str(self.file)], env=outer_environment(), **pipes)

    def wait_for_a_step(self, process: ScriptProcess | subprocess.Popen[str]) -> None:
        """Until the process has written a line of metrics, or ended."""
        before = self.state()
        while process.poll() is None and self.state() in (before, (self.state()[0], 0)):
            time.sleep(0.005)

    def state(self) -> tuple[int, int]:
        return (self.metrics.stat().st_ino, self.metrics.stat().st_size) if self.metrics.exists() else (0, 0)


def check_same(metrics: Path, expected: Path) -> None:
    for key in KEYS:
        assert losses_of(metrics, key) == losses_of(expected, key), key


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(corpus: Path, tmp_path: Path, kills: int) -> None:
    """Saves, evaluations and steps follow each other within milliseconds, so that random moments fall into all of them."""
    length = {"train_iters": 30 * kills, "checkpoint_factor": 3, "keep_last_n_checkpoints": 2, "eval_interval": 4, "eval_iters": 4}
    values = run_values(corpus, tmp_path / "straight", hidden_dropout=0.1, **length)
    train_losses(values)
    run = Run({**values, "save": str(tmp_path / "killed")}, tmp_path, interpreter=kills > 3)
    moments = random.Random(kills)
    landed = 0
    while landed < kills:
        process = run.start()
        run.wait_for_a_step(process)
        time.sleep(moments.uniform(0.0, 0.6))
        assert process.poll() is None, f"the run was over after {landed} kills:\n{process.communicate()[0]}"
        process.kill()
        process.communicate()
        landed += 1
    output = "".join(map(str, run.start().communicate(timeout=240)))
    assert "Going on from" in output
    check_same(run.metrics, tmp_path / "straight/metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_stop(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    values = run_values(corpus, tmp_path / "straight", train_iters=80, checkpoint_factor=1000)
    train_losses(values)
    run = Run({**values, "save": str(tmp_path / "stopped")}, tmp_path)
    process = run.start()
    run.wait_for_a_step(process)
    process.send_signal(number)
    output = "".join(map(str, process.communicate(timeout=60)))
    assert process.returncode == 128 + number, output
    assert f"{number.name} received: the run finishes the current step, then saves and stops." in output
    stopped_at = len(losses_of(run.metrics))
    assert 0 < stopped_at < 80
    assert (tmp_path / f"stopped/global_step{stopped_at}").is_dir()
    assert f"global_step{stopped_at}. The same command goes on from there." in output.replace("\n", "")
    run.start().communicate(timeout=120)
    check_same(run.metrics, tmp_path / "straight/metrics.jsonl")


def test_a_run_that_was_started_to_ignore_ctrl_c_goes_on(corpus: Path, tmp_path: Path) -> None:
    run = Run(run_values(corpus, tmp_path / "run", train_iters=30, eval_iters=0), tmp_path)
    run.interrupt = signal.SIG_IGN
    process = run.start()
    run.wait_for_a_step(process)
    process.send_signal(signal.SIGINT)
    output = "".join(map(str, process.communicate(timeout=60)))
    assert process.returncode == 0, output
    assert len(losses_of(run.metrics)) == 30


def test_user_errors_are_sentences(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    values = run_values(tmp_path / "nothing", tmp_path / "save")
    file.write_text(json.dumps(values))
    process = start(file)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 1
    assert "Traceback" not in output
    assert str(tmp_path / "nothing") in output
