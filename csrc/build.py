#!/usr/bin/env python
"""Compiles csrc: the index builders into megatron/data/builders, the kernels into megatron/kernels. `make setup` does it.

    python csrc/build.py [builders] [kernels] [--sets NAME ...] [--emulated] [--sanitize]

Without names both are compiled. Where it cannot be done, NumPy and PyTorch do their work. A build that does not compute what the definition in Python
does is thrown away; of the kernels, an instruction set that does not is refused, and the next best one is used. Exit status 0: all are there; 1: some
are not, and why was said.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
COMPILERS = ("c++", "g++", "clang++")
BASE = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# Each operation is compiled once for each of these, best last; megatron/kernels/compiled.py chooses at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16", "-DNEOX_DOT=1"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DNEOX_DOT=2"],
}
EMULATED = {name: ["-mavx2", "-mfma", "-DNEOX_EMULATED", f"-DNEOX_DOT={dot}"] for dot, name in ((1, "emulated_avx512bf16"), (2, "emulated_amx"))}
# GCC warns about the calling convention of wide vectors; no such call leaves a file.
KERNEL_FLAGS = [*BASE, "-O3", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# A fused multiply-add rounds once where NumPy rounds twice, and the order of blended samples hangs on the last bit.
BUILDER_FLAGS = [*BASE, "-O2", "-ffp-contract=off"]
# Run on the fresh build, in a process of its own: a crash is a failure like any other.
CHECK_BUILDERS = """
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
# Says which set it tries, and which one is good. Sets that are known to be good or refused are its third and fourth argument.
CHECK_KERNELS = """
import os, sys
os.environ["NEOX_INSTRUCTION_SET"] = "generic"
sys.path[:0] = sys.argv[1:3]
import built
sys.modules["megatron.kernels.built"] = built
from megatron.kernels import compiled
from megatron.kernels.self_check import check
for name in sys.argv[4].split():
    built.refuse_instruction_set(name)
compiled.built()
for name in built.instruction_sets():
    if name not in sys.argv[3].split():
        print("try", name, flush=True)
        check(built, name)
        print("good", name, flush=True)
"""
DISAGREES = "what was compiled does not agree with the definition in Python"
TORCH_ALLOCATOR = "libneox_torch.so"


class NotBuilt(Exception):
    """Why something could not be compiled."""


@dataclass(frozen=True)
class Product:
    """A module to be compiled."""

    name: str
    """As messages have it."""
    folder: Path
    """Where it goes."""
    module: str
    check: str
    """A program that fails where the build does not agree with its definition."""
    without: str
    """What happens without it."""


BUILDERS = Product(
    "index builders",
    ROOT / "megatron/data/builders",
    "compiled",
    CHECK_BUILDERS,
    "NumPy's are used; they need more time for many millions of documents.",
)
KERNELS = Product("kernels", ROOT / "megatron/kernels", "built", CHECK_KERNELS, "PyTorch's are used; experts take about twice the time.")


def build(product: Product, options: argparse.Namespace) -> str:
    """Compiles, checks and puts in place; returns the compiler. Raises NotBuilt."""
    compiler = choose_compiler()
    name = f"{product.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=product.folder) as folder:
        output = Path(folder) / name
        commands, flags = builder_commands(folder) if product is BUILDERS else kernel_commands(compiler, Path(folder), options)
        compile_all(compiler, commands)
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []

        def link() -> None:
            run([*compiler, "-shared", *undefined, *map(str, sorted(Path(folder).glob("*.o"))), *flags, "-o", str(output)], "the linker failed")

        if product is KERNELS:
            write_verdict(compiler, folder, [], [])
        link()
        if product is KERNELS and not options.sanitize:
            write_verdict(compiler, folder, *check_sets(product, folder))
            link()
            build_torch_allocator(compiler, Path(folder), product.folder)
        elif not options.sanitize:
            run([sys.executable, "-c", product.check, folder, str(ROOT)], DISAGREES)
        os.replace(output, product.folder / name)
    return shlex.join(compiler)


def build_torch_allocator(compiler: list[str], folder: Path, target: Path) -> None:
    """What lets PyTorch take large blocks from our heap. Without it training only needs more memory, so this raises nothing."""
    if sys.platform != "linux" or (found := importlib.util.find_spec("torch")) is None or found.origin is None:
        return
    torch, source, output = Path(found.origin).parent, SOURCES / "memory/torch_allocator.cpp", folder / TORCH_ALLOCATOR
    version = f'-DTORCH_VERSION="{importlib.metadata.version("torch")}"'
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", version, f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    try:
        run([*compiler, *flags, str(source), "-lc10", "-o", str(output)], "the compiler failed")
        os.replace(output, target / TORCH_ALLOCATOR)
    except NotBuilt as reason:
        print(f"kernels: PyTorch keeps its own way to find memory, and training needs up to a tenth more of it: {reason}")


def compile_all(compiler: list[str], commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        list(pool.map(lambda command: run([*compiler, *command], "the compiler failed"), commands))


def check_sets(product: Product, folder: str) -> tuple[list[str], list[str]]:
    """(The sets of this processor that agree with the definitions, those that do not; these are named.) Raises NotBuilt where `generic` does not."""
    good: list[str] = []
    refused: list[str] = []
    while True:
        command = [sys.executable, "-c", product.check, folder, str(ROOT), " ".join(good), " ".join(refused)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line.split() for line in done.stdout.splitlines() if line.startswith(("try ", "good "))]
        good += [name for word, name in said if word == "good"]
        if done.returncode == 0:
            return good, refused
        if not said or said[-1] == ["try", "generic"] or said[-1][0] == "good":
            raise NotBuilt("\n".join([f"{DISAGREES}:", *(done.stdout + done.stderr).strip().splitlines()[-15:]]))
        refused.append(said[-1][1])
        crash = f"the process that ran it was ended by signal {-done.returncode}"
        reason = crash if done.returncode < 0 else done.stderr.strip().splitlines()[-1].removeprefix("AssertionError: ")
        print(f"{product.name}: the instruction set {refused[-1]} is refused, and the next best one is used: {reason}.")


def write_verdict(compiler: list[str], folder: str, checked: list[str], refused: list[str]) -> None:
    """Compiles the two lists that bindings.cpp reads."""
    source = Path(folder) / "verdict.cpp"
    lines = []
    for name, sets in (("CHECKED_SETS", checked), ("REFUSED_SETS", refused)):
        entries = "".join(f'"{each}", ' for each in sets)
        lines += [f"extern const char* const {name}[];", f"const char* const {name}[] = {{{entries}nullptr}};"]
    source.write_text("\n".join(lines) + "\n")
    compile_all(compiler, [[*BASE, "-c", str(source), "-o", str(source.with_suffix(".o"))]])


def builder_commands(folder: str) -> tuple[list[list[str]], list[str]]:
    """(One compiler call for each source, what the linker is given besides the objects.)"""
    sys.path.insert(0, str(ROOT))
    from megatron.data.builders import source_digest

    flags = [*BUILDER_FLAGS, *(f"-I{path}" for path in include_folders()), f'-DSOURCE_DIGEST="{source_digest(SOURCES / "data")}"']
    return [[*flags, "-c", str(source), "-o", f"{folder}/{source.stem}.o"] for source in sorted((SOURCES / "data").glob("*.cpp"))], []


def kernel_commands(compiler: list[str], folder: Path, options: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """The same for the kernels: the bindings, and what `operation_commands` returns."""
    sys.path.insert(0, str(ROOT))
    from megatron.kernels.source_digest import source_digest

    operations, flags = operation_commands(compiler, folder, options)
    digest = f'-DSOURCE_DIGEST="{source_digest(SOURCES)}"'
    includes = [f"-I{path}" for path in include_folders()]
    bindings = [
        *KERNEL_FLAGS,
        *flags,
        chosen_sets(options)[1],
        digest,
        *includes,
        "-c",
        str(SOURCES / "bindings.cpp"),
        "-o",
        str(folder / "bindings.o"),
    ]
    return [bindings, *operations], flags


def operation_commands(compiler: list[str], folder: Path, options: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """(Compiler calls for every operation and instruction set, and for the comparison of two sets; the flags that the linker needs too.)"""
    sets, listed = chosen_sets(options)
    flags = [*openmp_flags(compiler, folder), *(SANITIZE if options.sanitize else [])]
    check = [
        [*KERNEL_FLAGS, "-O1", *flags, listed, "-c", str(source), "-o", str(folder / f"self_check-{source.stem}.o")]
        for source in sorted((SOURCES / "self_check").glob("*.cpp"))
    ]
    operations = [
        [*KERNEL_FLAGS, *flags, *extra, f"-DNEOX_ISA={name}", "-c", str(source), "-o", str(folder / f"{source.parent.name}-{name}.o")]
        for source in sorted(SOURCES.glob("*/cpu.cpp"), key=lambda path: -path.stat().st_size)
        for name, extra in sets.items()
    ]
    heap = [*BASE, "-O2", *flags, "-c", str(SOURCES / "memory/heap.cpp"), "-o", str(folder / "heap.o")]
    return [*operations, *check, heap], flags


def chosen_sets(options: argparse.Namespace) -> tuple[dict[str, list[str]], str]:
    """(Compiler flags of each set, the definition that tells include/operations.h their names.)"""
    sets = dict(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
    sets = {name: flags for name, flags in sets.items() if name == "generic" or not options.sets or name in options.sets}
    sets |= EMULATED if options.emulated else {}
    return sets, f"-DNEOX_SETS(X)={' '.join(f'X({name})' for name in sets)}"


def openmp_flags(compiler: list[str], folder: Path) -> list[str]:
    """-fopenmp where the compiler has it; else one thread computes."""
    probe = folder / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    done = subprocess.run([*compiler, "-fopenmp", str(probe), "-o", str(folder / "probe")], capture_output=True, check=False)
    return ["-fopenmp"] if done.returncode == 0 else []


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("products", nargs="*", choices=["builders", "kernels", []], metavar="builders|kernels", help="what to compile; default: both")
    parser.add_argument("--sets", nargs="+", choices=list(INSTRUCTION_SETS), help="instruction sets to compile besides generic; default: all")
    parser.add_argument("--emulated", action="store_true", help="also compile the 16-bit instructions written out in C++, for tests")
    parser.add_argument("--sanitize", action="store_true", help="compile the kernels with ASan and UBSan; they are not checked here")
    options = parser.parse_args()
    status = 0
    for product in (BUILDERS, KERNELS):
        if options.products and product.folder.name != options.products[0]:
            continue
        started = time.monotonic()
        try:
            compiler = build(product, options)
        except (NotBuilt, OSError) as reason:
            print(f"{product.name}: not compiled, {reason}\n{product.name}: {product.without}")
            status = 1
        else:
            print(f"{product.name}: compiled with {compiler} in {time.monotonic() - started:.0f} s.")
    return status


if __name__ == "__main__":
    sys.exit(main())
