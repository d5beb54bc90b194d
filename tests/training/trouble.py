"""A plugin for runs in tests: one process gets into trouble.

TROUBLE names it: `KIND:RANK:NUMBER:SECONDS`, such as `sleep:1:4:60`: at its fourth forward pass; with `saving-` before the kind at its first save.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

from megatron.training import step
from megatron.training.callbacks import checkpoint

forward_pass, save_checkpoint, numbers = step.forward, checkpoint.save_checkpoint, itertools.count(1)


def forward(*args: Any, **settings: Any) -> Any:
    meet("", next(numbers))
    return forward_pass(*args, **settings)


def save(*args: Any, **settings: Any) -> Any:
    meet("saving-", 1)
    return save_checkpoint(*args, **settings)


def meet(place: str, number: int) -> None:
    """Nothing happens on other processes, at other times and at other places."""
    kind, rank, when, seconds = os.environ["TROUBLE"].split(":")
    if kind.startswith("saving-") == bool(place) and (os.environ.get("RANK"), number) == (rank, int(when)):
        get_into(kind.removeprefix("saving-"), float(seconds))


def get_into(kind: str, seconds: float) -> None:
    if kind == "raise":
        raise ZeroDivisionError("a bug in one process")
    if kind in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # "sleep" does nothing, "compute" is busy
        time.sleep(0.0 if kind == "compute" else seconds)


step.forward = forward
checkpoint.save_checkpoint = save
