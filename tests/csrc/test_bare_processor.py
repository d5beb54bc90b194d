"""AVX-512, AVX512-bf16 and AMX code, run in full on a processor that has these instructions: the one that Bochs emulates.

It needs Bochs 3.0 or newer as `bochs` on the PATH, compiled for it (15 minutes on one core):

    ./configure --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex --enable-amx --enable-all-optimizations --with-nogui && make

The program of instruction_sets.cpp runs there without a system: bare_processor/ switches the processor on and answers the program's system calls.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.building import build_comparison

MACHINE = Path(__file__).parent / "bare_processor"
ROM_BYTES = 65536
CONFIGURATION = """
cpu: model=sapphire_rapids, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=rom.bin, address=0xffff0000
vgaromimage: file=no_graphics.bin
optramimage1: file=machine.bin, address=0x2000000
port_e9_hack: enabled=1
boot: floppy
display_library: nogui
log: bochs.log
panic: action=fatal
clock: sync=none
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bochs") is None:
        pytest.skip("Bochs is not on this machine; the head of this file says how it is made")
    if shutil.which("gcc") is None or shutil.which("objcopy") is None:
        pytest.skip("a program without a system needs gcc and binutils, which are not on this machine")
    return build_comparison(tmp_path_factory.mktemp("program"), static=True)


def make_machine(folder: Path, program: Path, arguments: list[str]) -> None:
    """Puts the ROM, the memory with the program in it, and Bochs' configuration into `folder`."""

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True)

    (folder / "program").symlink_to(program)
    words = ", ".join(f'"{word}"' for word in [program.name, *arguments])
    freestanding = ["-O1", "-ffreestanding", "-fno-pic", "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none"]
    run("gcc", "-Wa,-I.", "-c", str(MACHINE / "start.S"))
    run("gcc", *freestanding, f"-DARGUMENTS={words}", "-c", str(MACHINE / "monitor.c"))
    run("ld", "-static", "-nostdlib", "-z", "noexecstack", "-no-pie", "-T", str(MACHINE / "link.ld"), "start.o", "monitor.o", "-o", "machine")
    run("objcopy", "-O", "binary", "-j", ".text", "machine", "machine.bin")
    run("objcopy", "-O", "binary", "-j", ".rom", "machine", "rom.end")
    end = (folder / "rom.end").read_bytes()
    (folder / "rom.bin").write_bytes(bytes(ROM_BYTES - len(end)) + end)
    (folder / "no_graphics.bin").write_bytes(bytes(32768))
    (folder / "bochsrc").write_text(CONFIGURATION)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512bf16", "amx"])
def test_a_set_computes_what_generic_does_on_a_processor_that_has_it(program: Path, tmp_path: Path, name: str) -> None:
    make_machine(tmp_path, program, ["--quick", "--tiles-are-on", name])
    done = subprocess.run(["bochs", "-q", "-f", "bochsrc"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=1800, check=False)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert f"{name} bf16: " in said, said[-2000:]
    assert " passed, 0 failed" in said, said[-2000:]
    assert "exit status 0000000000000000" in said, said[-2000:]
