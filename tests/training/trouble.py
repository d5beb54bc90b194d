"""A plugin for runs in tests: one process gets into trouble at one forward pass. TROUBLE names it: `KIND:RANK:NUMBER`, such as `sleep:1:4`."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

from megatron.training import step

original, numbers = step.forward, itertools.count(1)


def forward(*args: Any, **settings: Any) -> Any:
    kind, rank, number = os.environ["TROUBLE"].split(":")
    if (os.environ.get("RANK"), next(numbers)) == (rank, int(number)):
        get_into(kind)
    return original(*args, **settings)


def get_into(kind: str) -> None:
    if kind == "raise":
        raise ZeroDivisionError("a bug in one process")
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 60
    while time.monotonic() < end:  # "sleep" alone does nothing, "compute" is busy
        time.sleep(0.0 if kind == "compute" else 60.0)


step.forward = forward
