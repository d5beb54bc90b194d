"""The heap for large blocks on a CPU (`csrc/memory`): PyTorch and our kernels take blocks of a mebibyte and more from it.

A step of training asks for the same blocks as the one before. In malloc's heap gaps are left between them that no block fits into; here they are not.
This saves 4 to 11 % of the peak memory of a run. NEOX_HEAP=system leaves everything to malloc.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.kernels.compiled import load
from megatron.kernels.registry import KernelUnavailable

LOGGER = logging.getLogger(__name__)
LIBRARY = Path(__file__).with_name("libneox_torch.so")
SWITCH = "NEOX_HEAP"
"""The environment variable that says whose heap is used: ours or the system's."""
CHOICES = ("ours", "system")


@functools.cache
def use_heap() -> bool:
    """From now on large blocks come from the heap, where it was compiled; why they do not is logged. Only the first call decides.

    Raises KernelUnavailable for a value of NEOX_HEAP that is neither of the two.
    """
    wanted = os.environ.get(SWITCH, "ours")
    if wanted not in CHOICES:
        raise KernelUnavailable(f"{SWITCH} = '{wanted}' is not known; it is one of: {', '.join(CHOICES)}")
    built, _ = load()  # without it a kernel says so
    if built is None or wanted == "system":
        return False
    library, reason = _library()
    if library is None:
        LOGGER.info("memory for large blocks: %s. Training needs up to a tenth more of it.", reason)
        return False
    built.use_heap(True)
    library.neox_use_heap(*map(ctypes.c_void_p, built.heap_functions()))
    return True


@contextmanager
def systems_heap() -> Iterator[None]:
    """Inside this context large blocks come from malloc."""
    built, _ = load()
    before = built is not None and built.use_heap(False)
    try:
        yield
    finally:
        if built is not None:
            built.use_heap(before)


def trim_heap() -> None:
    """Returns to the system what is free in the heap."""
    built, _ = load()
    if built is not None:
        built.trim_heap()


def _library() -> tuple[ctypes.CDLL | None, str]:
    """What tells PyTorch, or None and the reason."""
    if not LIBRARY.is_file():
        return None, f"{LIBRARY.name} was not compiled (`python csrc/build.py kernels` does it)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "neox_torch_version"))).decode()
    except (OSError, ValueError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error})"
    if version != torch.__version__:
        return (
            None,
            f"{LIBRARY.name} was compiled for PyTorch {version} and this is {torch.__version__} (`python csrc/build.py kernels` compiles it again)",
        )
    return library, ""
