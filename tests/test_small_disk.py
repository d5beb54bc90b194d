"""The small disk of the tests is gone when they are, also when they are killed: nobody can remove a folder with a disk in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DISK_BYTES, mounted

HOLD = """import sys, time
from pathlib import Path
from tests.conftest import mounted
with mounted(Path(sys.argv[1])) as disk:
    print(disk, flush=True)
    time.sleep(60)
"""


def test_it_is_there_and_goes(tmp_path: Path) -> None:
    with mounted(tmp_path) as disk:
        if disk is None:
            pytest.skip("a small disk cannot be mounted here (needs root)")
        assert os.path.ismount(disk)
        room = os.statvfs(disk)
        assert room.f_blocks * room.f_frsize == DISK_BYTES
    assert not os.path.ismount(tmp_path)


def test_it_goes_when_the_tests_are_killed(tmp_path: Path, repository: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() == "None\n":
        process.kill()
        pytest.skip("a small disk cannot be mounted here (needs root)")
    assert os.path.ismount(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while os.path.ismount(tmp_path):
        assert time.monotonic() < end, "the disk outlived the process"
        time.sleep(0.02)


def test_none_where_none_can_be_mounted(tmp_path: Path) -> None:
    with mounted(tmp_path / "nothing") as disk:
        assert disk is None
