"""Every instruction set of the compiled kernels against the set `generic`, and what happens to one that computes something else."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.building import build_comparison

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # most of it compiles
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"),
]
needs_avx2 = pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text(), reason="the processor has no AVX2: there is one set alone"
)


@pytest.mark.parametrize("sanitize", [False, True], ids=["", "sanitized"])
def test_every_set_computes_what_generic_does(tmp_path: Path, sanitize: bool) -> None:
    """Sanitized: with ASan and UBSan, which end the program at the first bad access."""
    program = build_comparison(tmp_path, sanitize=sanitize)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    for name in ("emulated_avx512bf16", "emulated_amx"):
        assert f"{name} bf16: " in done.stdout
    passed = int(done.stdout.splitlines()[-1].removesuffix(" passed, 0 failed"))
    assert passed > 2 * 300
    unknown = subprocess.run([str(program), "avx3"], capture_output=True, text=True, timeout=60, check=False)
    assert (unknown.returncode, unknown.stdout) == (2, "avx3 is not compiled, or this processor does not have it\n")


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """The kernels and their sources, nothing compiled."""
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    (tmp_path / "megatron").mkdir()
    shutil.copy(repository / "megatron/__init__.py", tmp_path / "megatron")
    shutil.copytree(repository / "megatron/kernels", tmp_path / "megatron/kernels", ignore=shutil.ignore_patterns("*.so", ".build-*"))
    return tmp_path


def wrong(checkout: Path, statement: str, sets: str) -> subprocess.CompletedProcess[str]:
    """What compiling says after `statement` was put at the start of the grouped product."""
    source = checkout / "csrc/grouped_gemm/cpu.cpp"
    start = "void grouped_matmul(const GroupedMatmul& op) {\n"
    assert start in source.read_text()
    source.write_text(source.read_text().replace(start, start + statement))
    command = [sys.executable, str(checkout / "csrc/build.py"), "kernels", "--sets", sets]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=900, check=False)


def loaded(checkout: Path, **environment: str) -> list[object]:
    """[The set that is used, those that are refused, what the module finds wrong with avx2]"""
    program = (
        "import json; from megatron.kernels import compiled; m = compiled.built();"
        "print(json.dumps([m.instruction_set(), m.refused_sets(), m.difference('avx2')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
    )
    return list(json.loads(done.stdout))


@needs_avx2
@pytest.mark.parametrize(
    ("statement", "reason"),
    [("if (VECTOR_BYTES == 32) return;\n", "differs by"), ("if (VECTOR_BYTES == 32) __builtin_trap();\n", "was ended by signal 4")],
    ids=["wrong", "crash"],
)
def test_a_set_that_computes_something_else_is_refused_and_the_next_best_is_used(checkout: Path, statement: str, reason: str) -> None:
    done = wrong(checkout, statement, "avx2")
    assert done.returncode == 0, done.stdout + done.stderr
    refusal, built = done.stdout.splitlines()
    assert refusal.startswith("kernels: the instruction set avx2 is refused, and the next best one is used: ")
    assert reason in refusal
    assert built.startswith("kernels: compiled with ")
    for environment in ({}, {"NEOX_INSTRUCTION_SET": "avx2"}):
        used, refused, found = loaded(checkout, **environment)
        assert (used, refused) == ("generic", ["avx2"])
        assert reason in str(found)


def test_a_build_whose_generic_set_computes_something_else_is_thrown_away(checkout: Path) -> None:
    done = wrong(checkout, "if (VECTOR_BYTES == 16) return;\n", "generic")
    assert done.returncode == 1
    assert "kernels: not compiled, what was compiled does not agree with the definition in Python:" in done.stdout
    assert "gemm, torch.float32: result 0 differs by" in done.stdout
    assert not list((checkout / "megatron/kernels").glob("built*"))
