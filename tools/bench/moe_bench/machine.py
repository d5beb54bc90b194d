"""The machine that a benchmark runs on: its processor, its rates, its clock."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megatron.config.machine import usable_cores
from megatron.kernels.compiled import load

Call = Callable[[], object]
FEATURES = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
"""Name in /proc/cpuinfo -> name in the report."""
DISTURBANCE = 0.1
"""Cores used by others from which on the report says so."""
SLOW_SHARE = 1 / 4
"""A dtype whose products reach less than this share of float32's rate has no instructions: the processor emulates it."""


@dataclass(frozen=True)
class Machine:
    """What figures depend on."""

    processor: str
    features: tuple[str, ...]
    capability: str
    """PyTorch's name for the instructions that it uses."""
    cores: int
    threads: int
    load: float
    """Programs that wanted to run, mean of the last minute."""
    kernels: str
    """The instructions that the compiled kernels use, or why there are none."""
    gpu: str | None
    """None: measured on the CPU."""

    def sentences(self) -> list[str]:
        """For a reader of the table."""
        features = ", ".join(self.features) or "none of avx2, avx512, avx512_bf16, amx_bf16"
        lines = [
            f"Processor: {self.processor} ({features}; PyTorch: {self.capability}), {self.cores} cores, {self.threads} threads.",
            f"Compiled kernels: {self.kernels}.",
            f"Load average at the start: {self.load:.1f}.",
        ]
        if self.gpu:
            lines.append(f"GPU: {self.gpu}.")
        if self.load > self.cores:
            lines.append("Note: more programs ran than the machine has cores. Only the ratios mean something.")
        return lines


def this_machine(device: str) -> Machine:
    """Of this process, now."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    processor, features = read_cpuinfo(cpuinfo)
    capability = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    built, reason = load()
    kernels = reason if built is None else built.instruction_set()
    return Machine(processor, features, capability, usable_cores(), torch.get_num_threads(), os.getloadavg()[0], kernels, gpu)


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """(name of the processor, those of FEATURES that it has); the platform's word for the processor where the text names none."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else platform.machine(), tuple(word for flag, word in FEATURES.items() if flag in there)


class Watch:
    """The time since the start, and how much of the machine other programs used meanwhile."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = time.perf_counter(), busy_seconds(), own_seconds()

    def say(self, what: str) -> None:
        """What is measured now, on stderr: the table comes at the end."""
        print(f"{time.perf_counter() - self.started:6.0f} s  {what}", file=sys.stderr, flush=True)

    def sentences(self, cores: int) -> list[str]:
        """Nothing where the system does not count it."""
        busy, wall = busy_seconds(), time.perf_counter() - self.started
        if busy is None or self.busy is None:
            return []
        share = max(0.0, busy - self.busy - (own_seconds() - self.own)) / wall
        lines = [f"Meanwhile other programs used {share:.2f} of the {cores} cores."]
        if share > DISTURBANCE:
            lines.append("Note: that disturbs the threads, which wait for each other. Measure again when the machine is quiet.")
        return lines


def busy_seconds() -> float | None:
    """Processor time of all programs since the start of the machine. None: not Linux."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def seconds(call: Call, repeats: int, device: str) -> float:
    """Mean time of `repeats` calls: by the clock on a CPU, by CUDA events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class Rates:
    """What the machine can do at most."""

    flops: float
    """Of a large matrix product, per second."""
    bandwidth: float
    """Bytes read or written per second by a stream that no cache holds."""


class Meter:
    """Measures the rates of a device; the factors are made once."""

    def __init__(self, device: str, *, size: int | None = None, stream_bytes: int | None = None) -> None:
        """`size` None: 2048 on a CPU, 8192 on a GPU. `stream_bytes` None: 256 MiB and 1 GiB."""
        self.device = device
        self.size = size or (8192 if device == "cuda" else 2048)
        count = (stream_bytes or (1 << 30 if device == "cuda" else 1 << 28)) // 4
        self.source, self.target = torch.ones(count, device=device), torch.zeros(count, device=device)
        self.rate = cache(self._rate)

    def _rate(self, dtype: torch.dtype) -> tuple[float, str]:
        """(FLOP/s of a square product in `dtype`, a note). A dtype without instructions is measured on a small product, which says so."""
        seconds(self._product(dtype, 128), 1, self.device)
        small = flops(256) / median_seconds(self._product(dtype, 256), self.device)
        if dtype != torch.float32 and small < SLOW_SHARE * self.rate(torch.float32)[0]:
            return small, "256^3, emulated: this processor has no instructions for it"
        return flops(self.size) / median_seconds(self._product(dtype, self.size), self.device), f"{self.size}^3"

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which products of `dtype` are fastest: an implementation may widen its factors."""
        return max((dtype, torch.float32), key=lambda each: self.rate(each)[0])

    def measure(self, dtype: torch.dtype) -> Rates:
        """Both rates, once, now."""
        best = self.product_dtype(dtype)
        product = seconds(self._product(best, self.size), 1, self.device)
        copy = seconds(lambda: self.target.copy_(self.source), 1, self.device)
        read = seconds(self.source.sum, 1, self.device)
        size = self.source.nbytes
        return Rates(flops(self.size) / product, max(2 * size / copy, size / read))

    @cache  # noqa: B019 the meter lives as long as the program
    def _product(self, dtype: torch.dtype, size: int) -> Call:
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)


def flops(size: int) -> float:
    """Of a product of two square matrices."""
    return 2.0 * size**3


def median_seconds(call: Call, device: str) -> float:
    """Of three calls after a first one."""
    call()
    return statistics.median(seconds(call, 1, device) for _ in range(3))
