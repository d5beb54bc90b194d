"""The repository's scripts in processes of their own that need not import everything again."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class ScriptProcess:
    """`python SCRIPT WORDS...` in a process of its own, with the methods of subprocess.Popen.

    It is a copy of a process that has imported everything (see tests/preloaded.py): a new interpreter needs seconds for that. It reads nothing; what
    it writes goes to files in `outputs` (default: `folder`, where it works). `interrupt` is what it finds as its reaction to Ctrl-C: a shell in the
    background would have it ignored, in the tests too.
    """

    def __init__(
        self,
        script: str,
        *words: str,
        folder: Path,
        environment: Mapping[str, str],
        interrupt: signal.Handlers = signal.SIG_DFL,
        outputs: Path | None = None,
    ) -> None:
        self.command = [str(REPOSITORY / script), *words]
        stem = (outputs or folder) / Path(script).name
        self.outputs = (Path(f"{stem}.stdout"), Path(f"{stem}.stderr"))
        work = (self.command, folder, self.outputs, dict(environment), interrupt)
        self.process = multiprocessing.get_context("forkserver").Process(target=_run, args=work)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its standard output and error, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"not done after {timeout} s")
        return self.outputs[0].read_text(), self.outputs[1].read_text()


def run_script(
    script: str, *words: str, folder: Path, environment: Mapping[str, str], timeout: float, outputs: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with a ScriptProcess."""
    process = ScriptProcess(script, *words, folder=folder, environment=environment, outputs=outputs)
    output, error = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.command, process.returncode, output, error)


def _run(command: list[str], folder: Path, outputs: tuple[Path, Path], environment: dict[str, str], interrupt: signal.Handlers) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler if interrupt == signal.SIG_DFL else interrupt)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # `multiprocessing` ends its processes without it
