"""Kernels in Triton without a GPU: they run in Triton's interpreter, and they compile for the GPUs that they are meant for.

Each test starts a process: whether a kernel is interpreted is decided when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.kernels import triton_kernels

needs_triton = pytest.mark.skipif(triton_kernels.unavailable() is not None, reason=str(triton_kernels.unavailable()))
FOLDER = Path("tests", "kernels")


def run(repository: Path, *command: str, interpret: bool) -> str:
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "01"[interpret]}
    finished = subprocess.run([sys.executable, *command], cwd=repository, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, f"{finished.stdout[-6000:]}\n{finished.stderr[-2000:]}"
    return finished.stdout


def pytest_of(repository: Path, file: Path, chosen: str) -> str:
    """The last line of pytest's output."""
    output = run(repository, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", os.fspath(file), "-k", chosen, interpret=True)
    return output.strip().splitlines()[-1]


@needs_triton
def test_float16_and_wrong_input_in_the_interpreter(repository: Path) -> None:
    last = pytest_of(repository, FOLDER / "interpreted_triton.py", "float16 or refused or nan")
    assert "14 passed" in last, last


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_float32_in_the_interpreter(repository: Path) -> None:
    last = pytest_of(repository, FOLDER / "interpreted_triton.py", "float32")
    assert "9 passed" in last, last


@needs_triton
def test_routing_in_the_interpreter(repository: Path) -> None:
    chosen = "triton and (equal_logits or without_probabilities or absent or order_is or (values and not float64 and (LoREs or seven)))"
    last = pytest_of(repository, Path("tests", "contracts", "test_route.py"), chosen)
    assert int(last.split()[0]) >= 36, last
    assert "skipped" not in last


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_contract_of_routing_in_the_interpreter(repository: Path) -> None:
    last = pytest_of(repository, Path("tests", "contracts", "test_route.py"), "triton")
    assert int(last.split()[0]) > 100, last
    assert "skipped" not in last


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_contract_in_the_interpreter(repository: Path) -> None:
    """Not in bfloat16: the interpreter multiplies its bits as if they were whole numbers."""
    last = pytest_of(repository, Path("tests", "contracts", "test_kernels.py"), "triton and not bfloat16")
    assert int(last.split()[0]) > 100, last
    assert "skipped" not in last


@needs_triton
def test_a_structmoe_layer_compiles_without_spills(repository: Path) -> None:
    output = run(repository, os.fspath(FOLDER / "compile_triton.py"), "bfloat16", "80", "quick", interpret=False)
    for kernel in ("project", "route", "route_backward"):
        assert f"{kernel}_kernel sm_80" in output


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_kernel_compiles_without_spills(dtype: str, repository: Path) -> None:
    output = run(repository, os.fspath(FOLDER / "compile_triton.py"), dtype, "80", "90", interpret=False)
    for kernel in (
        "matmul",
        "outer",
        "sum_rows",
        "project",
        "activation_backward",
        "scale",
        "gather",
        "combine",
        "combine_backward",
        "route",
        "route_backward",
    ):
        assert f"{kernel}_kernel sm_80" in output
        assert f"{kernel}_kernel sm_90" in output


def test_without_the_package_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    assert "the package triton is not installed" in str(triton_kernels.unavailable())
