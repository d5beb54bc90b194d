"""What a launcher's tests start twice: a worker that is told to stop, and takes its time. Its files say how far it is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

# On SIGTERM or SIGINT it waits until the other one has had its signal too (as a checkpoint does), takes its time, and notes how many came.
WORKER = """import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
rank = os.environ["RANK"]
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
(folder / f"started{rank}").write_text(str(os.getpid()))
while not signals:
    time.sleep(0.02)
(folder / f"stopping{rank}").write_text("x")
while not all((folder / f"stopping{other}").exists() for other in (0, 1)):
    time.sleep(0.02)
time.sleep(0.5)
(folder / f"saved{rank}").write_text(str(len(signals)))
"""


def both(folder: Path, name: str) -> tuple[Path, Path]:
    """A file of each worker."""
    return folder / f"{name}0", folder / f"{name}1"


def wait_for(*paths: Path, seconds: float = 90) -> None:
    """Until all are there and have something in them."""
    end = time.monotonic() + seconds
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < end, f"{paths} did not appear"
        time.sleep(0.02)


def end_who_is_left(folder: Path) -> None:
    """Workers that a failing test leaves behind, by the ids that they wrote."""
    for started in folder.glob("started?"):
        pid = started.read_text()
        command = Path("/proc") / pid / "cmdline"
        if pid and command.exists() and str(folder).encode() in command.read_bytes():
            os.kill(int(pid), signal.SIGKILL)
