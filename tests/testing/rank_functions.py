"""What the processes of test_distributed.py run where no group is needed; no torch here, so that they start at once."""

from __future__ import annotations

import os
import signal
import sys
import time


def environment() -> tuple[str, str, str, str]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], os.environ["DS_ACCELERATOR"]


def imported_by_now(module: str) -> bool:
    return module in sys.modules


def rank_one_is_killed() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def rank_one_exits() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)


def rank_one_hangs_here() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def returns_what_cannot_travel() -> object:
    return lambda: None
