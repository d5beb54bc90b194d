"""The machine (GPUs, cores), and the care of launchers that others wrote: signals reach their workers once, and nobody outlives the run."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from megatron.config.failures import FOLDER
from megatron.config.machine import usable_cores
from megatron.launcher.deaths import noted_end
from megatron.launcher.workers import IMPATIENCE_S, PATIENCE_S, say_what_failed, signals_to, start_in_session

_MOMENT_S = 0.3  # between two looks at the launcher
_PARENTS = (b"deepspeed.launcher.launch", b"torch.distributed.run")


@dataclass(frozen=True)
class Machine:
    """What there is to run on. visible: the entries of CUDA_VISIBLE_DEVICES, or None when it is not set."""

    gpus: int
    cores: int
    visible: tuple[str, ...] | None = None

    @property
    def device_type(self) -> str:
        """PyTorch's name of the devices that a process here computes on."""
        return "cuda" if self.gpus else "cpu"

    def devices(self, count: int) -> list[int | str]:
        """The device numbers of the first `count` processes (just numbers without GPUs)."""
        if self.gpus and self.visible:
            return [int(name) if name.isdigit() else name for name in self.visible[:count]]
        return list(range(count))


def survey() -> Machine:
    """This machine as PyTorch would see it, without importing PyTorch."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = None if text is None else tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "-1"))
    gpus = 0 if _torch_is_for_cpu() or visible == () or os.environ.get("DS_ACCELERATOR") == "cpu" else _driver_gpus()
    return Machine(gpus if visible is None else min(gpus, len(visible)), usable_cores(), visible)


def _torch_is_for_cpu() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


def _driver_gpus() -> int:
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return len(list(folder.iterdir()))
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def run_until_done(argv: Sequence[str], env: Mapping[str, str], workers: int, end_elsewhere: Sequence[str] = ()) -> int:
    """Runs a launcher in a session of its own and returns its exit status (128 + n for a worker that signal n ended).

    `end_elsewhere`: the command that ends the workers on other machines, which a signal to the launcher does not reach.

    SIGINT and SIGTERM go to the workers alone, once, and this waits for as long as they need to save. A launcher would kill those that are not done
    after 30 s; so it is kept out of it. A second Ctrl-C ends everything at once. When this process dies, the launcher gets SIGTERM from the kernel. A
    signal that this process was started to ignore stays ignored.

    A traceback of a worker is repeated on standard error, so that it is the last thing that is said. If the launcher starts its workers through
    `workers.run_under_another`, one that a signal ended is named, and the others have PATIENCE_S to end.
    """
    with tempfile.TemporaryDirectory(prefix="failures_") as folder:
        process = start_in_session(argv, {**env, FOLDER: folder})
        stop = _Stop(process.pid, workers, partial(_start_quietly, end_elsewhere, env) if end_elsewhere else None)
        try:
            with signals_to(stop):
                status = _wait(process, Path(folder))
        finally:
            _signal_group(process.pid, signal.SIGTERM)  # whoever is left, should the launcher have died before its workers
            if process.returncode:
                stop.end_elsewhere()
        failed = noted_end(Path(folder))
        if stop.received is None:
            say_what_failed(Path(folder), failed)
    if failed is not None and failed.status < 0 and stop.received is None:
        return failed.shell_status
    if stop.received is not None and stop.reached_all and status:
        return 128 + stop.received
    return _shell_status(status)


class _Stop:
    """What a signal does: see `run_until_done`."""

    def __init__(self, launcher: int, workers: int, elsewhere: Callable[[], None] | None) -> None:
        self.launcher = launcher
        self.workers = workers
        self.elsewhere = elsewhere
        self.received: int | None = None
        """The first signal; None before it."""
        self.reached_all = False
        """It went to the launcher too, for the workers were not all there: what the launcher returns says nothing then."""
        self._moment = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._moment = number, time.monotonic()
            self.reached_all = not (self.end_elsewhere() or _signal_workers(self.launcher, self.workers, number))
        elif number == signal.SIGINT and time.monotonic() - self._moment > IMPATIENCE_S:
            _kill_workers(self.launcher)  # torchrun's are in sessions of their own
            _signal_group(self.launcher, signal.SIGKILL)

    def end_elsewhere(self) -> bool:
        """Ends the workers on other machines; False where there are none."""
        if self.elsewhere is not None:
            self.elsewhere()
        return self.elsewhere is not None


def _start_quietly(argv: Sequence[str], env: Mapping[str, str]) -> None:
    subprocess.Popen(list(argv), env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> int:
    """The exit status. From PATIENCE_S after the first failure on, workers that are left are killed."""
    deadline: float | None = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_MOMENT_S)
        if deadline is None and noted_end(folder) is not None:
            deadline = time.monotonic() + PATIENCE_S
        if deadline is not None and time.monotonic() > deadline:
            _kill_workers(process.pid)


def _signal_workers(launcher: int, expected: int, number: int) -> bool:
    """The signal to every worker; SIGTERM to the whole session, and False, when they are not all there yet, or run on other machines."""
    found = _workers(launcher)
    if len(found) < expected:
        _signal_group(launcher, signal.SIGTERM)
        return False
    for pid in found:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return True


def _kill_workers(launcher: int) -> None:
    for pid in _workers(launcher):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _workers(launcher: int) -> list[int]:
    """The worker processes: children of a launcher of DeepSpeed or torch, which is `launcher` itself or somewhere below it. Empty without /proc."""
    children = _children_by_parent()
    below = [launcher]
    for pid in below:
        below.extend(children.get(pid, []))
    return [child for pid in below if any(name in _command_line(pid) for name in _PARENTS) for child in children.get(pid, [])]


def _children_by_parent() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # the process has ended in the meantime
        children.setdefault(parent, []).append(int(stat.parent.name))
    return children


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _shell_status(status: int) -> int:
    """A process that signal n ended: -n from subprocess, 256 - n when DeepSpeed's launcher has passed -n on as its own status."""
    if status < 0:
        return 128 - status
    return 128 + 256 - status if status > 256 - signal.NSIG else status
