"""A run of deepy.py that loses one process: all others are gone soon, the status is not 0, and a restart goes on with no sample lost or repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.launcher.deaths import rank_of
from tests.scripts import REPOSITORY
from tests.training.runs import losses_of, outer_environment, run_values

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"num_gpus": 2},
    "data, ZeRO 1": {"num_gpus": 2, "zero_optimization": {"stage": 1}},
    "tensor": {"num_gpus": 2, "model_parallel_size": 2},
    "expert": {"num_gpus": 2, "moe_expert_parallel_size": 2},
    "pipe": {"num_gpus": 2, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
}
"""Name -> the keys of a layout. Another layout is one more line."""
GONE_WITHIN_S = 30.0


class Run:
    """`deepy.py train.py` with a file of its own; its processes are found by that file's name in their environment."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.file = folder / "run.json"
        self.file.write_text(json.dumps(values))
        self.metrics = Path(values["save"]) / "metrics.jsonl"
        self.log = folder / "log.txt"

    def start(self) -> subprocess.Popen[str]:
        environment = {**outer_environment(), "LOST_PROCESS_TEST": str(self.file)}
        command = [sys.executable, str(REPOSITORY / "deepy.py"), "train.py", str(self.file)]
        with self.log.open("w") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def ranks(self) -> dict[str, int]:
        """Rank -> process id, of the worker processes that are there."""
        mark, found = f"LOST_PROCESS_TEST={self.file}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                there = mark in (folder / "environ").read_bytes().split(b"\0") and b"train.py\0--local_rank" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if there and (rank := rank_of(int(folder.name))) is not None:
                found[rank] = int(folder.name)
        return found

    def steps(self) -> int:
        return len(losses_of(self.metrics)) if self.metrics.exists() else 0

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        end = time.monotonic() + 120
        while self.steps() < step:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"step {step} did not come"
            time.sleep(0.02)


def finish(run: Run) -> list[float]:
    process = run.start()
    assert process.wait(240) == 0, run.log.read_text()
    return losses_of(run.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_killed_in_a_step(corpus: Path, tmp_path: Path, layout: str, victim: str) -> None:
    values = run_values(corpus, tmp_path / "straight", train_iters=40, eval_iters=0, train_micro_batch_size_per_gpu=2, checkpoint_factor=4)
    values |= {**LAYOUTS[layout], "hidden_dropout": 0.1, "resume_if_exists": True}
    (tmp_path / "a").mkdir()
    expected = finish(Run(tmp_path / "a", values))
    (tmp_path / "b").mkdir()
    run = Run(tmp_path / "b", {**values, "save": str(tmp_path / "killed")})
    for step in (6, 17):
        process = run.start()
        run.wait_for_step(process, step)
        pids = run.ranks()
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        while run.ranks() and time.monotonic() - killed < GONE_WITHIN_S:
            time.sleep(0.05)
        assert not run.ranks(), f"processes {sorted(run.ranks())} outlived process {victim} by {GONE_WITHIN_S:.0f} s"
        assert process.wait(GONE_WITHIN_S) == 128 + signal.SIGKILL
        output = run.log.read_text()
        assert f"Process {victim} (pid {pids[victim]}) was ended by signal 9, SIGKILL" in output.splitlines()[-1]
        assert "Traceback" not in output
    assert finish(run) == expected, "the same samples in the same order, with the same random numbers"
    assert "Going on from" in run.log.read_text()


@pytest.mark.slow  # test_a_traceback_is_repeated_at_the_end holds the launcher's part, test_a_process_that_fails_speaks_last the processes'
def test_a_bug_in_one_process_is_said_last(corpus: Path, tmp_path: Path) -> None:
    own = {"num_gpus": 2, "plugins": ["tests.training.trouble"], "eval_iters": 0, "train_micro_batch_size_per_gpu": 2, "plot_file": None}
    values = {key: value for key, value in run_values(corpus, tmp_path / "save", train_iters=40, **own).items() if value is not None}
    run = Run(tmp_path, values)
    os.environ["TROUBLE"] = "raise:1:3:0"
    try:
        process = run.start()
    finally:
        del os.environ["TROUBLE"]
    assert process.wait(120) == 1
    lines = run.log.read_text().rstrip().splitlines()
    assert lines[-1] == "ZeroDivisionError: a bug in one process"
    begin = max(number for number, line in enumerate(lines) if line == "Process 1 failed first. Its traceback:")
    assert lines[begin + 1] == "Traceback (most recent call last):"
    assert any("in get_into" in line for line in lines[begin:])
