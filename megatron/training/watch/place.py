"""Where one process is: read from outside by another thread, so that the training loop does nothing for it.

The main thread is asked for nothing. Its stack, its processor time, its bytes read and written and the numbers of torch's process groups are read.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.distributed import distributed_c10d

import megatron.training.step as step_module

COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/nn/functional.py")
WRAPPERS = ("torch/distributed/c10d_logger.py", "deepspeed/comm/", "deepspeed/utils/", "/contextlib.py", "torch/utils/_contextlib.py")
"""Files between a caller and the collective that it calls."""
STEP, FIRST_STEP, ELSEWHERE = "step", "first step", "elsewhere"
BUSY = 0.02
"""A main thread that used this share of the time since the last look has computed."""


@dataclass(frozen=True)
class Place:
    """Where a process is. `still_s`: for how long its main thread has not moved. `operation`: the collective it is in; None: in none."""

    rank: int
    step: int
    phase: str
    """STEP, FIRST_STEP (the first of this launch, which may compile) or ELSEWHERE (start, evaluation, saving, end)."""
    still_s: float
    operation: str | None
    line: str
    """`file:line, in function`: the innermost line that is not of torch or DeepSpeed."""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)


@dataclass(frozen=True)
class Group:
    """A process group as one of its members sees it."""

    members: tuple[int, ...]
    entered: int
    """How many of its operations this process has entered."""
    pending: tuple[str, ...]
    """Those that are not complete, such as `all_reduce([4])`."""


@dataclass(frozen=True)
class Account:
    """What a process says when the run hangs."""

    place: Place
    groups: dict[str, Group]
    stacks: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Account:
        groups = {name: Group(tuple(group["members"]), group["entered"], tuple(group["pending"])) for name, group in values["groups"].items()}
        return cls(Place(**values["place"]), groups, values["stacks"])


class Observer:
    """Looks at the main thread of this process. `counts_cpu`: computing is moving (not on GPUs, where waiting for the device computes too)."""

    def __init__(self, rank: int, *, counts_cpu: bool) -> None:
        self.rank = rank
        self.steps: Callable[[], int] = lambda: 0
        self._first_step = 0
        self.counts_cpu = counts_cpu
        self._main = threading.main_thread()
        self._marks: tuple[int, ...] = ()
        self._cpu = self._looked = 0.0
        self._moved = time.monotonic()

    def follow(self, steps: Callable[[], int]) -> None:
        """Call it before the first step of this launch. `steps` gives the number of steps done, now and later."""
        self.steps, self._first_step = steps, steps()

    def look(self) -> Place:
        """Call it from time to time: the place says for how long nothing has changed between looks."""
        frames = list(stack_of(self._main))
        now, cpu, step = time.monotonic(), self._cpu_seconds(), self.steps()
        marks = (step, hash(tuple((frame.f_code, frame.f_lasti) for frame in frames)), *operation_counts(), bytes_moved(self._main))
        computed = self.counts_cpu and cpu - self._cpu > BUSY * (now - self._looked)
        if computed or marks != self._marks:
            self._moved = now
        self._marks, self._cpu, self._looked = marks, cpu, now
        return Place(self.rank, step, self._phase(frames, step), now - self._moved, operation_of(frames), line_of(frames))

    def account(self) -> Account:
        place = self.look()
        return Account(place, groups_of(self.rank), all_stacks())

    def _phase(self, frames: list[FrameType], step: int) -> str:
        if TAKE_STEP not in (frame.f_code for frame in frames):
            return ELSEWHERE
        return FIRST_STEP if step == self._first_step else STEP

    def _cpu_seconds(self) -> float:
        ident = self._main.ident
        return time.clock_gettime(time.pthread_getcpuclockid(ident)) if ident is not None and hasattr(time, "pthread_getcpuclockid") else 0.0


def code_of(function: Callable[..., Any]) -> CodeType:
    return function.__code__


TAKE_STEP = code_of(step_module.take_step)


def stack_of(thread: threading.Thread) -> Iterator[FrameType]:
    """The frames of a thread, the innermost first."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def operation_of(frames: list[FrameType]) -> str | None:
    """The name of the collective operation that the code calls; None: it is in none. Where one calls another, the outer one counts."""
    return next((frame.f_code.co_name for frame in reversed(frames) if frame.f_code.co_filename.endswith(COLLECTIVES)), None)


def line_of(frames: list[FrameType]) -> str:
    libraries = ("/torch/", "/deepspeed/", *WRAPPERS)
    own = next((frame for frame in frames if not any(part in frame.f_code.co_filename for part in libraries)), frames[0] if frames else None)
    return "nowhere" if own is None else f"{short(own.f_code.co_filename)}:{own.f_lineno}, in {own.f_code.co_name}"


def short(file: str) -> str:
    """A file's path from the folder above its package on."""
    parts = Path(file).parts
    return "/".join(parts[len(parts) - 1 - parts[::-1].index("megatron") :] if "megatron" in parts else parts[-2:])


def operation_counts() -> tuple[int, ...]:
    """How many operations this process has entered, for each process group. Groups that do not count are left out."""
    counts = []
    for group in list(distributed_c10d._world.pg_map):
        try:
            counts.append(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
        except RuntimeError:
            continue
    return tuple(counts)


def bytes_moved(thread: threading.Thread) -> int:
    """What a thread has read and written; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/self/task/{thread.native_id}/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def groups_of(rank: int) -> dict[str, Group]:
    """Name -> group, for every process group of which this process is a member, from torch's flight recorder."""
    world = distributed_c10d._world
    members = {world.pg_names[group]: tuple(sorted(world.pg_group_ranks[group])) for group in list(world.pg_map)}
    entered, pending = dict.fromkeys(members, 0), {name: [] for name in members}  # type: dict[str, int], dict[str, list[str]]
    for entry in recorded():
        name = entry["process_group"][0]
        if name not in members:
            continue
        entered[name] = max(entered[name], entry["collective_seq_id"])
        if not entry["retired"] and entry["state"] != "completed":
            pending[name].append(f"{entry['profiling_name'].partition(':')[2]}({', '.join(map(str, entry['input_sizes']))})")
    return {name: Group(members[name], entered[name], tuple(pending[name][-3:])) for name in members if rank in members[name]}


def recorded() -> list[dict[str, Any]]:
    """The last operations that torch's flight recorder holds, of gloo and, where there is one, of NCCL."""
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    return entries


def all_stacks() -> str:
    """The stack of every Python thread of this process but the caller's, the main thread's last."""
    here = threading.get_ident()
    threads = sorted((thread for thread in threading.enumerate() if thread.ident != here), key=lambda thread: thread is threading.main_thread())
    frames = sys._current_frames()
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is not None:
            parts.append(f"Thread {thread.name}, most recent call last:\n{''.join(traceback.format_stack(frame))}")
    return "".join(parts)
