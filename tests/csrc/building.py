"""What the tests of csrc compile: the kernels on the emulated GPU, and the comparison of instruction sets.

Libraries are built once for all tests, and kept as long as the sources stay the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from megatron.kernels.cuda_library import CudaLibrary

ROOT = Path(__file__).resolve().parents[2]


@cache
def load_build(name: str) -> ModuleType:
    """csrc/`name`.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def load_cuda_build() -> ModuleType:
    """csrc/cuda_build.py"""
    return load_build("cuda_build")


def built(name: str, sources: list[Path]) -> Path:
    """The library of these sources for the CPU, from an earlier test run where nothing changed."""
    build = load_cuda_build()
    if shutil.which("g++") is None:
        pytest.skip("the emulation needs g++, which is not on this machine")
    target = ROOT / "build" / f"{name}-{build.digest(sources)}.so"
    target.parent.mkdir(exist_ok=True)
    if not target.is_file():
        build.build_emulation(target, sources)
    return target


@cache
def emulated() -> CudaLibrary:
    """Our kernels."""
    return CudaLibrary(built("emulation", load_cuda_build().sources()))


FLAG_OF_SET = {"avx2": "avx2", "avx512": "avx512dq", "avx512bf16": "avx512_bf16", "amx": "amx_bf16"}


def build_comparison(folder: Path, *, sanitize: bool = False, static: bool = False) -> Path:
    """The program of instruction_sets.cpp with all sets, the emulated ones too. `static`: it needs no library.

    `sanitize`: with ASan and UBSan; only the sets that this processor has, because compiling takes minutes.
    """
    build = load_build("build")
    sets = list(FLAG_OF_SET)
    if sanitize and Path("/proc/cpuinfo").is_file():
        here = Path("/proc/cpuinfo").read_text().split()
        sets = [name for name, flag in FLAG_OF_SET.items() if flag in here] or ["generic"]
    options = argparse.Namespace(sets=sets, emulated=True, sanitize=sanitize)
    compiler = build.choose_compiler()
    commands, flags = build.operation_commands(compiler, folder, options)
    source, target = ROOT / "tests/csrc/instruction_sets.cpp", folder / "instruction_sets"
    main = [*build.BASE, *flags, build.chosen_sets(options)[1], f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(folder / "main.o")]
    build.compile_all(compiler, [*commands, main])
    objects = map(str, sorted(folder.glob("*.o")))
    build.run([*compiler, *flags, *(["-static"] if static else []), *objects, "-o", str(target)], "the linker failed")
    return target
