"""tools/bench/gpu.py: what it plans takes at most ten minutes, a step that takes too long is ended, and without a GPU it says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gpu(repository: Path) -> ModuleType:
    """The program, which is in no package."""
    spec = importlib.util.spec_from_file_location("bench_gpu", repository / "tools/bench/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_all_steps_together_take_at_most_ten_minutes(gpu: ModuleType, tmp_path: Path) -> None:
    planned = gpu.steps("90", tmp_path, library=True, workers=8)
    assert [step.name for step in planned] == ["library", "tests", "kernels"]
    assert sum(step.seconds for step in planned) <= gpu.TOTAL_SECONDS < 600
    assert [step.name for step in gpu.steps("90", tmp_path, library=False, workers=8)] == ["tests", "kernels"]


def test_the_files_are_those_that_pytest_finds(gpu: ModuleType, repository: Path) -> None:
    """Each file marks a test, or takes its marks from the list of devices."""
    files = gpu.files_with_gpu_tests(repository)
    assert {"tests/contracts/test_kernels.py", "tests/contracts/test_route.py", "tests/csrc/test_cuda_kernels.py"} <= set(files)
    assert {"tests/tools/test_size.py", "tests/tools/test_bench_gpu.py"}.isdisjoint(files)


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    done = gpu.run(gpu.Step("slow", [sys.executable, "-c", parent], 4), tmp_path)
    assert done.outcome == "ended after 4 s"
    assert done.seconds < 20
    deadline = time.monotonic() + 10
    while running(int(done.last)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(int(done.last))


def running(process: int) -> bool:
    """An ended process that nobody has asked for may still have an entry."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def test_the_report_says_what_failed(gpu: ModuleType, tmp_path: Path) -> None:
    done = [
        gpu.run(gpu.Step(name, [sys.executable, "-c", code], 20), tmp_path) for name, code in (("good", "print('all of it')"), ("bad", "exit(3)"))
    ]
    text = gpu.report("a machine", done, tmp_path)
    assert "- good: passed, 0 s. all of it" in text
    assert "- bad: failed with exit status 3" in text
    assert "There is no table of kernels." in text


def test_without_a_gpu_it_says_so(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench/gpu.py", "--output", str(tmp_path / "gpu")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "PyTorch finds no CUDA device here; this program needs one\n")
    assert not (tmp_path / "gpu").exists()
