"""A run of deepy.py that loses one process: all others are gone soon, the status is not 0, and a restart goes on with no sample lost or repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import REPOSITORY, run_script
from tests.training.runs import losses_of, outer_environment, run_values

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"num_gpus": 1},
    "data": {"num_gpus": 2},
    "data, ZeRO 1": {"num_gpus": 2, "zero_optimization": {"stage": 1}},
    "tensor": {"num_gpus": 2, "model_parallel_size": 2},
    "expert": {"num_gpus": 2, "moe_expert_parallel_size": 2},
    "pipe": {"num_gpus": 2, "pipe_parallel_size": 2},
}
"""Name -> the keys of a layout. Another layout is one more line."""
SEVERAL = [name for name in LAYOUTS if name != "one"]
GONE_WITHIN_S = 30.0


@pytest.fixture(autouse=True)
def _nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no run behind."""
    yield
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"LOST_PROCESS_TEST={tmp_path}/".encode() in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


class Run:
    """`deepy.py train.py` with a file of its own; its processes are found by that file's name in their environment."""

    def __init__(self, folder: Path, values: dict[str, Any], **environment: str) -> None:
        self.file = folder / "run.json"
        self.file.write_text(json.dumps(values))
        self.metrics = Path(values["save"]) / "metrics.jsonl"
        self.log = folder / "log.txt"
        self.mark = str(folder)
        self.environment = {**outer_environment(), "LOST_PROCESS_TEST": self.mark, **environment}

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(REPOSITORY / "deepy.py"), "train.py", str(self.file)]
        with self.log.open("w") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def ranks(self) -> dict[str, int]:
        """Rank -> process id, of the worker processes that are there."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[1:3] == [b"-u", b"train.py"] and f"LOST_PROCESS_TEST={self.mark}".encode() in variables:
                found[next(variable[5:].decode() for variable in variables if variable.startswith(b"RANK="))] = int(folder.name)
        return found

    def steps(self) -> int:
        return len(losses_of(self.metrics)) if self.metrics.exists() else 0

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        end = time.monotonic() + 400
        while self.steps() < step:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"step {step} did not come"
            time.sleep(0.02)

    def lose(self, victim: str, step: int) -> str:
        """Starts it, kills one process in a step, and checks that the others go and that the last line says what has happened. Returns the output."""
        process = self.start()
        self.wait_for_step(process, step)
        pids = self.ranks()
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        while self.ranks() and time.monotonic() - killed < GONE_WITHIN_S:
            time.sleep(0.05)
        assert not self.ranks(), f"processes {sorted(self.ranks())} outlived process {victim} by {GONE_WITHIN_S:.0f} s"
        assert process.wait(GONE_WITHIN_S) == 128 + signal.SIGKILL
        output = self.log.read_text()
        assert f"Process {victim} (pid {pids[victim]}) was ended by signal 9, SIGKILL" in output.splitlines()[-1]
        return output


def make(corpus: Path, folder: Path, layout: str, **keys: Any) -> Run:
    """A run in a folder of its own: two micro-batches of two samples in a step, in every layout. `keys` win."""
    folder.mkdir(exist_ok=True)
    own = {
        "master_port": 29651,
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "eval_iters": 0,
        "checkpoint_factor": 4,
        "resume_if_exists": True,
    }
    return Run(folder, {**run_values(corpus, folder / "save", **own), **LAYOUTS[layout], **keys})


def finish(run: Run) -> list[float]:
    process = run.start()
    assert process.wait(400) == 0, run.log.read_text()
    return losses_of(run.metrics)


def finish_in_another_layout(corpus: Path, tmp_path: Path, layout: str, **keys: Any) -> None:
    """Every step has the loss of a run in one process that was not interrupted: another sample would have another loss."""
    straight = make(corpus, tmp_path / "straight", "one", **keys)
    done = run_script("train.py", str(straight.file), folder=straight.file.parent, environment=straight.environment, timeout=400)
    assert done.returncode == 0, done.stderr
    expected = losses_of(straight.metrics)
    assert len({round(loss, 3) for loss in expected}) > len(expected) // 2
    run = make(corpus, tmp_path / "killed", layout, **keys)
    assert finish(run) == pytest.approx(expected, abs=1e-4)
    assert "Going on from" in run.log.read_text()


@pytest.mark.timeout(400)
def test_killed_in_a_step_and_resumed_by_one_process(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "killed", "data", train_iters=12).lose("1", 6)
    finish_in_another_layout(corpus, tmp_path, "one", train_iters=12)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize(
    ("layouts", "last"),
    [
        (["data", "tensor"], "one"),
        (["tensor", "data, ZeRO 1"], "pipe"),
        (["pipe", "expert"], "data"),
        (["expert", "pipe"], "tensor"),
        (["data, ZeRO 1", "tensor"], "expert"),
    ],
)
def test_killed_in_one_layout_and_resumed_in_others(corpus: Path, tmp_path: Path, layouts: list[str], last: str, victim: str) -> None:
    """Twice: the second layout goes on from the first one's checkpoint, loses a process too, and the last one goes on from there."""
    for layout, step in zip(layouts, (6, 17), strict=True):
        make(corpus, tmp_path / "killed", layout, train_iters=24).lose(victim, step)
    finish_in_another_layout(corpus, tmp_path, last, train_iters=24)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", SEVERAL)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_killed_in_a_step(corpus: Path, tmp_path: Path, layout: str, victim: str) -> None:
    keys = {"train_iters": 24, "hidden_dropout": 0.1}
    expected = finish(make(corpus, tmp_path / "straight", layout, **keys))
    run = make(corpus, tmp_path / "killed", layout, **keys)
    for step in (6, 17):
        assert "Traceback" not in run.lose(victim, step)
    assert finish(run) == expected, "the same samples in the same order, with the same random numbers"
    assert "Going on from" in run.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_killed_on_one_of_two_hosts(corpus: Path, tmp_path: Path, victim: str) -> None:
    """Two launchers under torchrun: the one whose process was killed says so, and both end."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    keys = {"train_iters": 24, "hostfile": str(tmp_path / "hosts"), "launcher": "torchrun", "master_port": 29641 + int(victim)}
    keys |= {"save": str(tmp_path / "killed/save")}
    (tmp_path / "killed").mkdir()
    here, other = victim, str(1 - int(victim))
    runs = {rank: make(corpus, tmp_path / rank, "one", **keys) for rank in "01"}
    for rank, run in runs.items():
        run.environment["NODE_RANK"] = rank
    process = runs[other].start()
    try:
        runs[here].lose(victim, 6)
        assert process.wait(GONE_WITHIN_S) != 0
    finally:
        process.kill()
    assert not runs[other].ranks()
    finish_in_another_layout(corpus, tmp_path, "data", train_iters=24)


@pytest.mark.slow  # test_a_traceback_is_repeated_at_the_end holds the launcher's part, test_a_process_that_fails_speaks_last the processes'
def test_a_bug_in_one_process_is_said_last(corpus: Path, tmp_path: Path) -> None:
    own = {"num_gpus": 2, "plugins": ["tests.training.trouble"], "eval_iters": 0, "train_micro_batch_size_per_gpu": 2, "plot_file": None}
    values = {key: value for key, value in run_values(corpus, tmp_path / "save", train_iters=40, **own).items() if value is not None}
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", values, TROUBLE="raise:1:3:0")
    assert run.start().wait(400) == 1
    lines = run.log.read_text().rstrip().splitlines()
    assert lines[-1] == "ZeroDivisionError: a bug in one process"
    begin = max(number for number, line in enumerate(lines) if line == "Process 1 failed first. Its traceback:")
    assert lines[begin + 1] == "Traceback (most recent call last):"
    assert any("in get_into" in line for line in lines[begin:])
