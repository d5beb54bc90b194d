"""The kernels compiled from csrc, where they were built: loading them, and handing tensors over.

They run on CPUs, on contiguous tensors of float32, float64 and bfloat16, in the best instruction set that the processor has. Nothing is compiled
here: `python csrc/build.py kernels` does it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from megatron.kernels.registry import Implementation, KernelUnavailable
from megatron.kernels.source_digest import source_digest

P = TypeVar("P")
SMALL_WORK = 256 * 1024
LOGGER = logging.getLogger(__name__)
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
LIMIT = "NEOX_INSTRUCTION_SET"
"""The environment variable that names the best instruction set that may be used."""
MODULE = "megatron.kernels.built"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""The number of each format in csrc (`Dtype` of csrc/include/dtype.h)."""
WIDENED = (torch.float32, torch.bfloat16)
"""The formats of the kernels that compute in float32, whatever the format: a float64 would lose its precision there."""


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason: it was never built, cannot be loaded, or was built from other sources."""
    try:
        built = importlib.import_module(MODULE)
    except ModuleNotFoundError:
        return None, "not compiled (`python csrc/build.py kernels` does it)"
    except ImportError as error:
        return None, f"what was compiled cannot be loaded ({error})"
    if SOURCES.is_dir() and built.source_digest != source_digest(SOURCES):
        return None, "compiled from other sources than those in csrc (`python csrc/build.py kernels` compiles them again)"
    choose_set(built)
    return built, ""


def choose_set(built: ModuleType) -> None:
    """Uses the best set that this processor has, up to $NEOX_INSTRUCTION_SET. One that the build was not checked in is tried first.

    A set that computes something else than `generic` is refused, and a warning says so.
    Raises KernelUnavailable for a name that is not compiled.
    """
    known, limit = built.compiled_sets(), os.environ.get(LIMIT, "")
    if limit and limit not in known:
        raise KernelUnavailable(f"{LIMIT} = '{limit}' is not an instruction set of the compiled kernels; known: {', '.join(known)}")
    last = known.index(limit) if limit else len(known)
    usable = [name for name in built.instruction_sets() if known.index(name) <= last and (name == limit or not name.startswith("emulated"))]
    for name in list(usable):
        if name != "generic" and name not in built.checked_sets and (found := built.difference(name)):
            LOGGER.warning("compiled kernels: the instruction set %s is not used, because its results are wrong on this processor (%s).", name, found)
            built.refuse_instruction_set(name)
            usable.remove(name)
    built.use_instruction_set(usable[-1])


def built() -> ModuleType:
    """The compiled module. Only for an implementation that the registry found available."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"the compiled kernels cannot be used: {reason}")
    return module


def implementation(make: Callable[[], P]) -> Implementation[P]:
    """The entry `compiled` of an op."""

    def unavailable() -> str | None:
        module, reason = load()
        if module is None:
            _say_once(reason)
        return reason or None

    return Implementation("compiled", frozenset({"cpu"}), unavailable, make)


@functools.cache
def _say_once(reason: str) -> None:
    LOGGER.info("compiled kernels: %s. PyTorch's products are used; experts take more time.", reason)


def address(tensor: Tensor | None) -> int:
    """Where the numbers are; 0 for an absent tensor. The caller keeps the tensor alive and contiguous."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """`address` of each."""
    return [address(t) for t in tensors]


def threads_for(work: int) -> int:
    """PyTorch's number of threads, or 1 where waking them costs more than they save. `work`: bytes that are moved, or as much."""
    return torch.get_num_threads() if work > SMALL_WORK else 1


def serves(*tensors: Tensor | None, formats: Collection[torch.dtype] = DTYPES) -> bool:
    """Whether the tensors' format is one of `formats`. float16 and integers are left to the reference. Raises ValueError for mixed formats."""
    given = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1:
        raise ValueError(f"the tensors of one product have the formats {', '.join(sorted(map(str, dtypes)))}; give all of them one format")
    devices = {t.device.type for t in given}
    if devices != {"cpu"}:
        raise ValueError(f"the compiled kernels run on CPUs, but there are tensors on {', '.join(sorted(devices))}")
    return dtypes <= set(formats)


def counts(rows: Tensor) -> Tensor:
    """Row counts as csrc reads them. Raises ValueError for another format or device."""
    if rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise ValueError(f"row counts are {rows.dtype} on {rows.device}; they must be int64 on the CPU, where the rows are")
    return rows.contiguous()
