#!/usr/bin/env python
"""Do everything that needs a GPU, on one GPU, in at most ten minutes: build the CUDA kernels, run the tests, measure the kernels.

1. The library of CUDA kernels, for this GPU, unless it is built already. Without nvcc the others run without it, and the report says so.
2. The tests marked `gpu`.
3. `tools/bench/kernels.py --gpu`.

A step that takes too long is ended; the others still run. What they print goes to a file each in the output folder, and report.md says what became of
them. Exit status 1: a step failed. 2: PyTorch finds no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"import DEVICES\b|pytest\.mark\.gpu\b")
TOTAL_SECONDS = 590


class Step(NamedTuple):
    """A command, and how long it may take."""

    name: str
    command: Sequence[str]
    seconds: int


class Done(NamedTuple):
    """What became of a step."""

    name: str
    outcome: str
    """"passed", or what went wrong."""
    seconds: float
    last: str
    """The last line that it printed."""

    def line(self) -> str:
        """For the report."""
        return f"- {self.name}: {self.outcome}, {self.seconds:.0f} s. {self.last}".rstrip()


def files_with_gpu_tests(root: Path) -> list[str]:
    """Relative to `root`: collecting the others would take longer than the tests."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [path.relative_to(root).as_posix() for path in files if MARK.search(path.read_text(encoding="utf-8"))]


def steps(architecture: str, output: Path, *, library: bool, workers: int) -> list[Step]:
    """Together at most TOTAL_SECONDS. `library`: it is to be built."""
    python = sys.executable
    build = [Step("library", [python, "csrc/cuda_build.py", "--library", "--architectures", architecture], 130)] if library else []
    tests = [python, "-m", "pytest", "-m", "gpu", "-q", "-n", str(workers), "--dist", "worksteal", *files_with_gpu_tests(ROOT)]
    kernels = [python, "tools/bench/kernels.py", "--gpu", "--output", str(output)]
    return [*build, Step("tests", tests, 280), Step("kernels", kernels, 180)]


def run(step: Step, output: Path) -> Done:
    """Ends the step and what it started when its time is over."""
    started, path = time.monotonic(), output / f"{step.name}.txt"
    print(f"{step.name}: at most {step.seconds} s, {path}", flush=True)
    with path.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(step.seconds)
            outcome = "passed" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {step.seconds} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Done(step.name, outcome, time.monotonic() - started, lines[-1] if lines else "")


def report(machine: str, done: Sequence[Done], output: Path) -> str:
    """The report, with the table of kernels where it was made."""
    table = output / "kernels.md"
    parts = [
        machine,
        "\n".join(each.line() for each in done),
        table.read_text(encoding="utf-8") if table.is_file() else "There is no table of kernels.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu", help="the folder for the report (default: runs/gpu)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that the tests are spread over")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device here; this program needs one")
        return 2
    sys.path.insert(0, str(ROOT))
    from megatron.kernels import cuda_library

    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "kernels.md").unlink(missing_ok=True)
    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    planned = steps(architecture, given.output.resolve(), library=cuda_library.unavailable() is not None, workers=given.workers)
    done = [run(step, given.output) for step in planned]
    text = report(f"{torch.cuda.get_device_name()} (sm_{architecture}), PyTorch {torch.__version__}", done, given.output)
    (given.output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(each.outcome != "passed" for each in done))


if __name__ == "__main__":
    sys.exit(main())
