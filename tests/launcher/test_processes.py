"""Launchers that others wrote: signals reach each worker once and at the same time, statuses come back, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron.launcher.local import PROGRAM
from tests.launcher.two_workers import WORKER, both, end_who_is_left, wait_for

# Stands in for torchrun where only its behaviour towards signals and statuses matters (torchrun takes seconds to import).
# Its path must contain the name by which the real one is recognised.
STAND_IN = """import os, signal, subprocess, sys, time
workers = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)]
def stop(number, frame):
    for worker in workers:
        worker.kill()
    sys.exit(99)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
statuses = [worker.wait() for worker in workers]
sys.exit(next((status for status in statuses if status), 0))
"""
# As torchrun's, with parents of ours for the workers: it looks once a second, and ends the others when one has failed.
KILLING_LAUNCHER = """import os, subprocess, sys, time
workers = [subprocess.Popen([sys.executable, PROGRAM, *sys.argv[1:]], env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)]
while True:
    time.sleep(1)
    for worker in workers:
        if worker.poll():
            [other.terminate() for other in workers]
            [other.wait() for other in workers]
            sys.exit(worker.returncode)
""".replace("PROGRAM", repr(PROGRAM))
RUN = """import os, sys
from megatron.launcher import processes
from megatron.launcher.processes import run_until_done
processes.PATIENCE_S = float(os.environ.get("PATIENCE", processes.PATIENCE_S))
sys.exit(run_until_done(sys.argv[1:], os.environ, 2))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The stand-in and a worker; those that a failing test leaves behind are ended."""
    (tmp_path / "torch.distributed.run.py").write_text(STAND_IN)
    (tmp_path / "worker.py").write_text(WORKER)
    yield tmp_path
    end_who_is_left(tmp_path)


def start(folder: Path, worker: str = "worker.py", patience: float = 15.0) -> subprocess.Popen[bytes]:
    """Ctrl-C is heard; a shell in the background would have it ignored, in these tests too."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATIENCE": str(patience)}
    command = [sys.executable, "-c", RUN, sys.executable, str(folder / "torch.distributed.run.py"), str(folder / worker), str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)])
def test_workers_stop_together_and_have_time_to_save(folder: Path, signals: tuple[signal.Signals, ...]) -> None:
    process = start(folder)
    wait_for(*both(folder, "started"))
    for number in signals:
        process.send_signal(number)
    assert process.wait(90) == 0
    assert [file.read_text() for file in both(folder, "saved")] == ["1", "1"]


def test_a_second_interrupt_after_a_while_ends_everything_at_once(folder: Path) -> None:
    (folder / "stubborn.py").write_text(WORKER.replace("time.sleep(0.5)", "time.sleep(600)"))
    process = start(folder, "stubborn.py")
    wait_for(*both(folder, "started"))
    process.send_signal(signal.SIGINT)
    wait_for(*both(folder, "stopping"))
    time.sleep(2.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("code", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL), ("pass", 0)])
def test_the_workers_status_comes_back(folder: Path, code: str, status: int) -> None:
    (folder / "short.py").write_text(f"import os, signal, sys\n{code}\n")
    assert start(folder, "short.py").wait(90) == status


def test_a_process_that_was_killed_is_named(folder: Path) -> None:
    doomed = "    if rank == '1':\n        time.sleep(1)\n        os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(0.02)\n"
    (folder / "doomed.py").write_text(WORKER.replace("    time.sleep(0.02)\n", doomed, 1).replace("signals.append(number)", "sys.exit(0)"))
    (folder / "torch.distributed.run.py").write_text(KILLING_LAUNCHER)
    process = start(folder, "doomed.py")
    _, error = process.communicate(timeout=90)
    pid = (folder / "started1").read_text()
    assert process.returncode == 128 + signal.SIGKILL
    assert error.decode().startswith(f"Process 1 (pid {pid}) was ended by signal 9, SIGKILL: probably the machine had no memory left")
    assert error.decode().count("\n") == 1, "the others, which the launcher ends, are not named"


def test_a_worker_that_waits_for_a_dead_one_is_killed(folder: Path) -> None:
    """It waits in compiled code and does not hear SIGTERM; torchrun would give every such worker 30 s."""
    deaf = "import os, signal, sys, time\nfrom pathlib import Path\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nrank = os.environ['RANK']\n"
    (folder / "deaf.py").write_text(
        deaf + "Path(sys.argv[1], f'started{rank}').write_text(str(os.getpid()))\ntime.sleep(1.5 if rank == '1' else 60)\nsys.exit(5)\n"
    )
    (folder / "torch.distributed.run.py").write_text(KILLING_LAUNCHER)
    begin = time.monotonic()
    process = start(folder, "deaf.py", patience=1.0)
    assert process.wait(90) == 5
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_the_workers_are_there(folder: Path, number: signal.Signals) -> None:
    """The launcher's own status, 1, would look like a failure."""
    (folder / "torch.distributed.run.py").write_text(
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "pathlib.Path(sys.argv[2], 'started0').write_text('0')\ntime.sleep(30)\n"
    )
    process = start(folder)
    wait_for(folder / "started0")
    process.send_signal(number)
    assert process.wait(10) == 128 + number


def test_when_the_parent_is_killed_the_launcher_is_told(folder: Path) -> None:
    process = start(folder)
    wait_for(*both(folder, "started"))
    commands = [Path("/proc") / file.read_text() / "cmdline" for file in both(folder, "started")]
    if not commands[0].exists():
        pytest.skip("the kernel's notice of a parent's death is Linux's, and so is /proc")
    assert all(b"worker.py" in command.read_bytes() for command in commands)
    process.kill()
    process.wait(10)
    end = time.monotonic() + 10
    while any(command.exists() and b"worker.py" in command.read_bytes() for command in commands):
        assert time.monotonic() < end, "workers outlived the run"
        time.sleep(0.05)


@pytest.mark.slow
def test_deepy_s_own_launcher(folder: Path, repository: Path) -> None:
    (folder / "a.yml").write_text(
        "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\nmax_position_embeddings: 32\nnum_gpus: 2\n"
    )
    command = [sys.executable, str(repository / "deepy.py"), "script.py", "a.yml"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repository)}
    note = "(folder / f'environment{rank}').write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])\nsignals = []\n"
    (folder / "script.py").write_text("import sys; sys.argv[1:] = ['.']\n" + WORKER.replace("signals = []\n", note))
    process = subprocess.Popen(command, cwd=folder, env=environment)
    wait_for(*both(folder, "started"), seconds=60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert [file.read_text() for file in both(folder, "saved")] == ["1", "1"]
    assert [file.read_text() for file in both(folder, "environment")] == ["20", "21"]

    (folder / "script.py").write_text("raise SystemExit(7)\n")
    assert subprocess.run(command, cwd=folder, env=environment, check=False).returncode == 7
