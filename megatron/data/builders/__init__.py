"""Index builders: which tokens make a sample, which data set comes next. Compiled (csrc/data) where that was done, else NumPy's (reference.py)."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
from pathlib import Path
from types import ModuleType

from megatron.data.builders import reference

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "data"
COMPILED = "megatron.data.builders.compiled"


@functools.cache
def builders() -> ModuleType:
    """The module whose `cut_samples`, `pack_documents` and `blend` this process uses. It is chosen and logged once."""
    compiled, reason = load_compiled()
    if compiled is not None:
        logger.info("Index builders: compiled.")
        return compiled
    logger.info("Index builders: NumPy, because %s. `python csrc/build.py` compiles faster ones.", reason)
    return reference


def load_compiled() -> tuple[ModuleType | None, str]:
    """The compiled builders, or None and the reason: they were never built, cannot be loaded, or were built from other sources."""
    try:
        compiled = importlib.import_module(COMPILED)
    except ModuleNotFoundError:
        return None, "none were compiled"
    except ImportError as error:
        return None, f"the compiled ones cannot be loaded ({error})"
    if SOURCES.is_dir() and compiled.source_digest != source_digest(SOURCES):
        return None, "the compiled ones were built from other sources than those in csrc/data"
    return compiled, ""


def source_digest(folder: Path) -> str:
    """A digest of the sources. Compiled code holds it, so a change of the sources is noticed."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
