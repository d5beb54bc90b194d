#!/usr/bin/env python
"""Compiles the CUDA sources of csrc: objects with a table of their resources (`make cuda`), the library for this machine's GPU, or the emulation.

python csrc/cuda_build.py               every kernel for every architecture; a table; exit status 1 if one spills registers, 2 without nvcc
python csrc/cuda_build.py --library     megatron/kernels/libneox_cuda.so, for the architectures of `--architectures`
python csrc/cuda_build.py --emulation   megatron/kernels/libneox_emulation.so: the same sources for the CPU, for the tests
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
TARGET = CSRC.parent / "megatron" / "kernels"
LIBRARY, EMULATION = "libneox_cuda.so", "libneox_emulation.so"
ARCHITECTURES = ("80", "90", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# The runtime is not instrumented: it is what the instrumentation calls.
KERNEL_FLAGS = ["-x", "c++", "-O1", "-fsanitize=thread"]


class NotBuilt(Exception):
    """What stands in the way, and what to do."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    """Bytes of static shared memory; the tiles are dynamic."""
    spills: int
    """Bytes stored and loaded."""


def sources() -> list[Path]:
    return sorted(CSRC.glob("*/cuda.cu"))


def digest(kernels: list[Path]) -> str:
    """Of everything that a library of these kernels is made from."""
    files = [*kernels, *sorted(path for pattern in ("*/*.cuh", "emulation/*.cpp", "emulation/*.hpp") for path in CSRC.glob(pattern))]
    content = b"".join(path.name.encode() + path.read_bytes() for path in [*files, Path(__file__)])
    return hashlib.sha256(content).hexdigest()[:16]


def nvcc() -> str:
    program = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if program is None:
        raise NotBuilt("there is no nvcc (NVCC names one); it is part of the CUDA toolkit")
    return program


def run(command: list[str]) -> str:
    """What it printed. Raises NotBuilt with the end of that where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotBuilt("\n".join([f"{Path(command[0]).name} failed:", *(done.stdout + done.stderr).strip().splitlines()[-15:]]))
    return done.stdout + done.stderr


def compile_objects(architectures: list[str], folder: Path, chosen: list[Path], *flags: str) -> list[Kernel]:
    """Objects of these sources in `folder`, and what ptxas says about them."""
    targets = [*flags, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)]
    kernels = []
    for source in chosen:
        log = run([nvcc(), *NVCC_FLAGS, *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(folder / f"{source.parent.name}.o")])
        kernels += parse(log)
    return kernels


def known_architectures() -> list[str]:
    """Those of ours that this nvcc compiles for: an older one does not know the newest. Raises NotBuilt where there is none."""
    known = set(re.findall(r"compute_(\d+)", run([nvcc(), "--list-gpu-arch"])))
    ours = [architecture for architecture in ARCHITECTURES if architecture in known]
    if not ours:
        raise NotBuilt(f"nvcc compiles for none of {', '.join(ARCHITECTURES)}, but for {', '.join(sorted(known, key=int)) or 'nothing'}")
    return ours


def parse(log: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` prints."""
    entry = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'(.*?)Used (\d+) registers([^\n]*)", re.DOTALL)
    found = []
    for name, architecture, between, registers, rest in entry.findall(log):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", between)))
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(Kernel(demangle(name), architecture, int(registers), int(shared[1]) if shared else 0, spills))
    return found


def demangle(name: str) -> str:
    """`multiply_rows<Large, BFloat16, true, false>` where there is a program for it, else the mangled name."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        return name
    plain = subprocess.run([program, name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(bool\)(\d)", lambda match: "true" if match[1] == "1" else "false", plain)
    return plain.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0]


def table(kernels: list[Kernel]) -> str:
    """A line for each kernel."""
    width = max(len(kernel.name) for kernel in kernels)
    lines = [f"{'kernel':{width}}  arch   registers  static shared  spills"]
    for k in sorted(kernels, key=lambda kernel: (kernel.name, int(kernel.architecture))):
        lines.append(f"{k.name:{width}}  sm_{k.architecture:<4}{k.registers:>9}{k.shared:>15}{k.spills:>8}")
    return "\n".join(lines)


def build_library(architectures: list[str], target: Path) -> None:
    """The shared library for GPUs of these architectures; the drivers of later GPUs compile what is in it for the newest."""
    sys.path.insert(0, str(CSRC.parent))
    from megatron.kernels.source_digest import cuda_source_digest

    newest = max(architectures, key=int)
    flags = [f"-gencode=arch=compute_{newest},code=compute_{newest}", f"-DSOURCE_DIGEST=0x{cuda_source_digest(CSRC)}ull"]
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as name:
        folder = Path(name)
        compile_objects(architectures, folder, sources(), *flags)
        run([nvcc(), "-shared", *map(str, sorted(folder.glob("*.o"))), "-o", str(folder / "library.so")])
        os.replace(folder / "library.so", target)


def build_emulation(target: Path, kernels: list[Path]) -> None:
    """A shared library of these kernels for the CPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotBuilt(f"there is no {compiler} (CXX names another compiler; it must be GCC)")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as name:
        objects = []
        for source in [*kernels, *sorted((CSRC / "emulation").glob("*.cpp"))]:
            objects.append(Path(name) / f"{source.parent.name}-{source.stem}.o")
            flags = KERNEL_FLAGS if source.suffix == ".cu" else ["-O2"]
            run([compiler, *CXX_FLAGS, *flags, f"-I{CSRC / 'include'}", "-c", str(source), "-o", str(objects[-1])])
        run([compiler, "-shared", *map(str, objects), "-o", str(Path(name) / "library.so")])
        os.replace(Path(name) / "library.so", target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="store_true", help="build the library for a GPU")
    parser.add_argument("--emulation", action="store_true", help="build the library for the CPU")
    parser.add_argument("--architectures", nargs="+", help="compute capabilities without the point (default: 80 90 100, as far as nvcc knows them)")
    given = parser.parse_args()
    try:
        if given.emulation:
            build_emulation(TARGET / EMULATION, sources())
        elif given.library:
            build_library(given.architectures or known_architectures(), TARGET / LIBRARY)
        else:
            return check(given.architectures or known_architectures())
    except NotBuilt as reason:
        print(f"CUDA kernels: not compiled, {reason}")
        return 2
    print(f"CUDA kernels: {TARGET / (EMULATION if given.emulation else LIBRARY)}")
    return 0


def check(architectures: list[str]) -> int:
    """Prints the table; 1 where a kernel spills."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_objects(architectures, Path(folder), sources())
    print(table(kernels))
    spilling = [kernel for kernel in kernels if kernel.spills]
    for kernel in spilling:
        print(f"{kernel.name} spills {kernel.spills} bytes on sm_{kernel.architecture}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
