"""csrc/build.py: what it makes agrees with the definition, and what stands in its way is said in a sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """The sources and the package beside them, under a path with a space in it, nothing compiled."""
    folder = tmp_path / "a checkout"
    shutil.copytree(repository / "csrc", folder / "csrc")
    for part in ("__init__.py", "data/__init__.py", "data/builders", "kernels"):
        source, target = repository / "megatron" / part, folder / "megatron" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", ".build-*")) if source.is_dir() else shutil.copy(source, target)
    return folder


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")} | environment
    command = [sys.executable, str(checkout / "csrc/build.py"), "builders"]
    return subprocess.run(command, cwd="/", env=values, capture_output=True, text=True, timeout=170, check=False)


def left_over(checkout: Path) -> list[str]:
    folder = checkout / "megatron/data/builders"
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".so" or path.name.startswith(".build"))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere"}, "there is no C++ compiler (c++, g++, clang++; CXX names another)"),
        ({"CXX": "no-such-compiler -O9"}, "CXX = 'no-such-compiler -O9' is not a program here"),
        ({"CXX": "false"}, "the compiler failed:"),
    ],
)
def test_what_stands_in_the_way_is_said(checkout: Path, environment: dict[str, str], reason: str) -> None:
    done = build(checkout, **environment)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"index builders: not compiled, {reason}" in done.stdout
    assert "index builders: NumPy's are used" in done.stdout
    assert left_over(checkout) == []


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine")


@needs_compiler
def test_an_error_in_the_sources_is_shown(checkout: Path) -> None:
    (checkout / "csrc/data/builders.cpp").write_text("int main( {\n")
    done = build(checkout)
    assert done.returncode == 1
    assert "the compiler failed:" in done.stdout
    assert "builders.cpp:1" in done.stdout
    assert left_over(checkout) == []


@needs_compiler
@pytest.mark.slow
def test_a_build_is_checked_and_found(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stdout
    assert "index builders: compiled with" in done.stdout
    program = "from megatron.data.builders import builders; print(builders().__name__)"
    found = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True)
    assert found.stdout == "megatron.data.builders.compiled\n"


@needs_compiler
@pytest.mark.slow
def test_a_build_that_computes_something_else_is_thrown_away(checkout: Path) -> None:
    source = checkout / "csrc/data/builders.cpp"
    source.write_text(source.read_text().replace("if (lag > best_lag)", "if (lag >= best_lag)"))
    done = build(checkout)
    assert done.returncode == 1
    assert "what was compiled does not agree with the NumPy definition:" in done.stdout
    assert "AssertionError: blend" in done.stdout
    assert left_over(checkout) == []
