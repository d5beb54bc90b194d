"""Workers as our own children: signals reach each once and at the same time, statuses come back, deaths are named, nobody is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron.launcher.deaths import Ended, note_end, noted_end
from tests.launcher.two_workers import WORKER, both, end_who_is_left, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """import os, sys
from megatron.launcher import workers
workers.GRACE_S, workers.PATIENCE_S = float(os.environ["GRACE"]), float(os.environ["PATIENCE"])
sys.exit(workers.run_workers([workers.Command([sys.executable, *sys.argv[1:]], {**os.environ, "RANK": rank}) for rank in "01"]))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Has a worker in it; those that a failing test leaves behind are ended."""
    (tmp_path / "worker.py").write_text(WORKER)
    yield tmp_path
    end_who_is_left(tmp_path)


def start(folder: Path, code: str | None = None, *, interrupt: signal.Handlers = signal.SIG_DFL, times: str = "2 15") -> subprocess.Popen[str]:
    """`code`: of the workers, None the one above. `interrupt`: what the process finds as its reaction to Ctrl-C; a shell in the background would have
    it ignored, in these tests too. `times`: GRACE_S and PATIENCE_S."""
    if code is not None:
        (folder / "worker.py").write_text(f"import os, signal, sys, time\nfrom pathlib import Path\nrank = os.environ['RANK']\n{code}\n")
    grace, patience = times.split()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GRACE": grace, "PATIENCE": patience}
    command = [sys.executable, "-c", RUN, str(folder / "worker.py"), str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=partial(signal.signal, signal.SIGINT, interrupt))


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)])
def test_workers_stop_together_and_have_time_to_save(folder: Path, signals: tuple[signal.Signals, ...]) -> None:
    process = start(folder)
    wait_for(*both(folder, "started"))
    for number in signals:
        process.send_signal(number)
    assert process.wait(90) == 0
    assert [file.read_text() for file in both(folder, "saved")] == ["1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="tgkill, which chooses the thread, is Linux's")
def test_a_signal_that_another_thread_gets_is_heard(folder: Path) -> None:
    """The main thread sleeps, and nothing interrupts its call."""
    process = start(folder)
    wait_for(*both(folder, "started"))
    time.sleep(0.5)
    other = next(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir() if int(task.name) != process.pid)
    assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
    assert process.wait(30) == 0
    assert [file.read_text() for file in both(folder, "saved")] == ["1", "1"]


def test_workers_that_end_as_they_were_told_have_time(folder: Path) -> None:
    """The first one's status is no failure: the other one may save for longer than PATIENCE_S."""
    process = start(folder, WORKER.replace("time.sleep(0.5)", "time.sleep(2 * (rank == '1'))") + "sys.exit(143)", times="0.1 0.3")
    wait_for(*both(folder, "started"))
    process.terminate()
    assert process.wait(90) == 128 + signal.SIGTERM
    assert (folder / "saved1").exists()


def test_a_second_interrupt_after_a_while_ends_everything_at_once(folder: Path) -> None:
    process = start(folder, WORKER.replace("time.sleep(0.5)", "time.sleep(600)"))
    wait_for(*both(folder, "started"))
    process.send_signal(signal.SIGINT)
    wait_for(*both(folder, "stopping"))
    time.sleep(2.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("code", "status"), [("sys.exit(7)", 7), (KILL, 128 + signal.SIGKILL), ("pass", 0)])
def test_the_workers_status_comes_back(folder: Path, code: str, status: int) -> None:
    assert start(folder, code).wait(90) == status


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_process_that_was_killed_is_named(folder: Path, victim: str) -> None:
    """The other one fails because of it, and ends at the same moment as seen from a process that gets no time: this one is stopped meanwhile."""
    code = f"(Path(sys.argv[1]) / f'started{{rank}}').write_text(str(os.getpid()))\ntime.sleep(1)\n{KILL} if rank == '{victim}' else sys.exit(1)"
    process = start(folder, code)
    wait_for(*both(folder, "started"))
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGKILL
    pid = (folder / f"started{victim}").read_text()
    assert error.startswith(f"Process {victim} (pid {pid}) was ended by signal 9, SIGKILL: probably the machine had no memory left")
    assert error.count("\n") == 1


def test_the_others_are_ended_and_not_named(folder: Path) -> None:
    begin = time.monotonic()
    process = start(folder, f"time.sleep(0.3 if rank == '1' else 600)\n{KILL}", times="0.5 15")
    _, error = process.communicate(timeout=90)
    assert (process.returncode, error.count("\n")) == (128 + signal.SIGKILL, 1)
    assert time.monotonic() - begin < 30


def test_a_failure_of_the_others_is_heard_before_they_are_ended(folder: Path) -> None:
    process = start(folder, "time.sleep(0.6 * (rank == '0'))\nsys.stderr.write(f'{rank} has failed\\n')\nsys.exit(3 + int(rank))")
    assert (process.communicate(timeout=90)[1], process.returncode) == ("1 has failed\n0 has failed\n", 4)


def test_a_traceback_is_repeated_at_the_end(folder: Path) -> None:
    """Both workers fail; the first one's traceback is the last thing that is said."""
    code = "from megatron.config.failures import note_failure\ntime.sleep(0.5 * (rank == '0'))\n"
    code += "try:\n    1 / 0 if rank == '1' else [][0]\nexcept Exception as error:\n    note_failure(error)\n"
    process = start(folder, code + "time.sleep(2)\nsys.stderr.write('noise\\n')\nsys.exit(1)\n")
    _, error = process.communicate(timeout=90)
    lines = error.splitlines()
    assert process.returncode == 1
    assert lines[lines.index("Process 1 failed first (1 more failed too). Its traceback:") + 1] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_worker_that_waits_for_a_dead_one_is_killed(folder: Path) -> None:
    """It waits in compiled code and does not hear SIGTERM."""
    begin = time.monotonic()
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1.5 if rank == '1' else 60)\nsys.exit(5)"
    assert start(folder, code, times="0.3 1").wait(90) == 5
    assert time.monotonic() - begin < 40


def test_what_workers_have_started_ends_with_them(folder: Path) -> None:
    child = "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]])\n"
    assert start(folder, child + "(Path(sys.argv[1]) / f'started{rank}').write_text(str(child.pid))").wait(90) == 0
    commands = [Path("/proc") / file.read_text() / "cmdline" for file in both(folder, "started")]
    end = time.monotonic() + 10
    while any(command.exists() and command.read_bytes() for command in commands):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_that_was_started_to_ignore_ctrl_c_goes_on(folder: Path) -> None:
    process = start(folder, interrupt=signal.SIG_IGN)
    wait_for(*both(folder, "started"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert not (folder / "stopping0").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0


def test_when_the_parent_is_killed_the_workers_are_told(folder: Path) -> None:
    process = start(folder)
    wait_for(*both(folder, "started"))
    if not Path("/proc").exists():
        pytest.skip("the kernel's notice of a parent's death is Linux's")
    process.kill()
    wait_for(*both(folder, "saved"))


@pytest.mark.parametrize(("number", "named"), [(signal.SIGTERM, "15, SIGTERM: "), (40, "40, a real-time signal: "), (9, "9, SIGKILL: probably")])
def test_every_signal_is_named(number: int, named: str) -> None:
    assert f"Process 1 (pid 5) was ended by signal {named}" in str(Ended("1", 5, -number).sentence())
    assert Ended("1", 5, 3).sentence() is None


def test_the_first_end_that_was_noted_counts_but_sigkill_before_all(tmp_path: Path) -> None:
    assert noted_end(tmp_path) is None
    for pid, status in ((3, 1), (2, -6), (1, 1)):
        note_end(tmp_path, Ended(str(pid), pid, status))
        time.sleep(0.01)
    assert noted_end(tmp_path) == Ended("3", 3, 1)
    note_end(tmp_path, Ended("9", 9, -9))
    assert noted_end(tmp_path) == Ended("9", 9, -9)
