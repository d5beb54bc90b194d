"""Kernels in Triton that several ops use, and whether Triton can run here. Importing this package does not import Triton.

Modules that import it: `products`, `hidden`, `rows`, `routing`, and the `triton.py` of each op. Only `Implementation.make` imports those.
Under `TRITON_INTERPRET=1` Triton runs its kernels on the CPU, one tile at a time, in NumPy. Then the implementations take CPU
tensors. That is for tests.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"})


def unavailable() -> str | None:
    """Why no kernel of Triton can run. None: they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; it exists for Linux)"
    return None
