"""Batches on several processes: their order, their number, their errors, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.data.preprocessing.workers import AHEAD, THREADS, WorkerError, map_in_order, single_threaded

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Slow:
    """Later numbers are quicker, so that results come out of order if nobody holds them."""

    count: int

    def start(self) -> Callable[[int], tuple[int, int, str | None]]:
        def work(number: int) -> tuple[int, int, str | None]:
            time.sleep(max(0, self.count - number) * 0.01)
            return number * number, os.getpid(), os.environ.get(THREADS)

        return work


class Unpicklable(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__("it broke")


@dataclass(frozen=True)
class Faulty:
    how: str

    def start(self) -> Callable[[int], int]:
        if self.how == "start":
            raise ValueError("cannot start")

        def work(number: int) -> int:
            if number == 3:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.how == "exit":
                    os._exit(7)
                raise ValueError("the third") if self.how == "error" else Unpicklable(1, lambda: 2)
            return number

        return work


def test_results_come_in_order_from_processes_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "true")
    results = list(map_in_order(Slow(8), ((number, f"note {number}") for number in range(8)), 2))
    assert [(square, note) for (square, _, _), note in results] == [(number * number, f"note {number}") for number in range(8)]
    processes = {process for (_, process, _), _ in results}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {threads for (_, _, threads), _ in results} == {"false"}
    assert os.environ[THREADS] == "true"


def test_one_worker_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "true")
    assert list(map_in_order(Slow(2), [(0, "a"), (1, "b")], 1)) == [((0, os.getpid(), "false"), "a"), ((1, os.getpid(), "false"), "b")]
    assert os.environ[THREADS] == "true"
    monkeypatch.delenv(THREADS)
    with single_threaded():
        assert os.environ[THREADS] == "false"
    assert THREADS not in os.environ


def test_no_more_is_read_than_is_worked_on() -> None:
    read = 0

    def batches() -> Iterator[tuple[int, None]]:
        nonlocal read
        for number in range(100):
            read += 1
            yield number, None

    for done, _ in enumerate(map_in_order(Slow(0), batches(), 2), start=1):
        assert read <= done + AHEAD * 2
        if done == 20:
            break
    assert read < 100


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", ValueError, "the third"),
        ("start", ValueError, "cannot start"),
        ("odd", WorkerError, "Unpicklable: it broke"),
        (
            "kill",
            WorkerError,
            r"a worker process was ended by SIGKILL \(the system does that when memory runs out\); nothing was written. Fewer --workers",
        ),
        ("exit", WorkerError, r"a worker process ended with status 7; .* `if __name__ == '__main__':`"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_here(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        list(map_in_order(Faulty(how), ((number, None) for number in range(50)), 2))


def test_processes_do_not_outlive_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from megatron.data.preprocessing.workers import map_in_order\n"
        "from tests.data.preprocessing.test_workers import Slow\n"
        "if __name__ == '__main__':\n"
        f"    for (_, process, _), note in map_in_order(Slow(0), ((number, None) for number in range(10**9)), 2):\n"
        f"        Path({str(tmp_path)!r}, str(process)).touch()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: len(children(tmp_path)) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(alive(process) for process in children(tmp_path)))


def children(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def alive(process: int) -> bool:
    """Whether it runs; a zombie that nobody collects does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)
