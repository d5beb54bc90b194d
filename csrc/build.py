#!/usr/bin/env python
"""Compiles the index builders of csrc/data into megatron/data/builders. `make setup` does it; where it cannot be done, NumPy does their work.

A build that does not compute what the NumPy definition does is thrown away. Exit status 0: they are there; 1: they are not, and why was said.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "data"
TARGET = ROOT / "megatron" / "data" / "builders"
# A fused multiply-add rounds once where NumPy rounds twice, and the order of blended samples hangs on the last bit.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
COMPILERS = ("c++", "g++", "clang++")
# Run on the fresh build, in a process of its own: a crash is a failure like any other.
CHECK = """
import sys
import numpy as np
sys.path[:0] = sys.argv[1:3]
import compiled
from megatron.data.builders import reference

rng = np.random.default_rng(0)
for _ in range(20):
    sizes, order = rng.integers(0, 50, 30, dtype=np.int32), rng.integers(0, 30, 200, dtype=np.int32)
    weights = rng.integers(1, 4, 5) / 10  # with ties
    for name, arguments in (
        ("cut_samples", (sizes, order, 7, int(sizes[order].sum() - 1) // 7 + 1)),
        ("pack_documents", (sizes[sizes > 0], 3, 40)),
        ("blend", (weights, 5000)),
    ):
        for ours, right in zip(getattr(compiled, name)(*arguments), getattr(reference, name)(*arguments), strict=True):
            assert np.array_equal(ours, right), name
"""


class NotBuilt(Exception):
    """Why there are no compiled builders."""


def build() -> str:
    """Compiles, checks and puts in place; returns the compiler. Raises NotBuilt."""
    sys.path.insert(0, str(ROOT))
    from megatron.data.builders import source_digest

    compiler = choose_compiler()
    name = f"compiled{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=TARGET) as folder:
        output = Path(folder) / name
        includes = [f"-I{path}" for path in include_folders()]
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        digest = f'-DSOURCE_DIGEST="{source_digest(SOURCES)}"'
        run([*compiler, *FLAGS, *link, digest, *includes, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(output)], "the compiler failed")
        run([sys.executable, "-c", CHECK, folder, str(ROOT)], "what was compiled does not agree with the NumPy definition")
        os.replace(output, TARGET / name)
    return shlex.join(compiler)


def choose_compiler() -> list[str]:
    """$CXX, else the first that is installed."""
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise NotBuilt(f"CXX = '{os.environ['CXX']}' is not a program here")
        return given
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NotBuilt(f"there is no C++ compiler ({', '.join(COMPILERS)}; CXX names another)")


def include_folders() -> list[str]:
    """Headers of this Python and of pybind11."""
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise NotBuilt(f"{python} has no Python.h (Debian and Ubuntu have it in python{sys.version_info.major}.{sys.version_info.minor}-dev)")
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("the package pybind11 is not installed (requirements/requirements.txt pins it)") from None
    return [python, pybind11.get_include()]


def run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotBuilt("\n".join([f"{failure}:", *(done.stdout + done.stderr).strip().splitlines()[-15:]]))


def main() -> int:
    started = time.monotonic()
    try:
        compiler = build()
    except (NotBuilt, OSError) as reason:
        print(f"index builders: not compiled, {reason}\nindex builders: NumPy's are used; they need more time for many millions of documents.")
        return 1
    print(f"index builders: compiled with {compiler} in {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
