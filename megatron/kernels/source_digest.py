"""A digest of the kernels' C++ sources. Compiled code holds it, so a change of the sources is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def source_digest(folder: Path) -> str:
    """The digest of csrc's files that the compiled kernels are made of."""
    parts = "*/cpu.cpp", "self_check/*.cpp", "memory/*.cpp", "*/*.h"
    return _digest(folder, [folder / "bindings.cpp", *(file for part in parts for file in folder.glob(part))])


def cuda_source_digest(folder: Path) -> str:
    """The digest of csrc's files that the library for a GPU is made of."""
    return _digest(folder, [*folder.glob("*/cuda.cu"), *folder.glob("*/*.cuh")])


def _digest(folder: Path, files: Iterable[Path]) -> str:
    """16 digits of base 16."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
