"""A digest of the kernels' C++ sources. Compiled code holds it, so a change of the sources is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_digest(folder: Path) -> str:
    """The digest of csrc's files that the compiled kernels are made of."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([folder / "bindings.cpp", *folder.glob("*/cpu.cpp"), *folder.glob("self_check/*.cpp"), *folder.glob("*/*.h")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
