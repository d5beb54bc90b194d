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
    """The module whose `cut_samples`, `pack_documents` and `blend` this process uses. Chosen, and said in the log, once."""
    compiled, reason = load_compiled()
    if compiled is not None:
        logger.info("Index builders: the compiled ones.")
        return compiled
    logger.info("Index builders: NumPy's, %s; `python csrc/build.py` compiles faster ones.", reason)
    return reference


def load_compiled() -> tuple[ModuleType | None, str]:
    """The compiled builders, or None and why not: they were never built, cannot be loaded, or were built from other sources than lie here."""
    try:
        compiled = importlib.import_module(COMPILED)
    except ModuleNotFoundError:
        return None, "for none were compiled"
    except ImportError as error:
        return None, f"for the compiled ones cannot be loaded ({error})"
    if SOURCES.is_dir() and compiled.source_digest != source_digest(SOURCES):
        return None, "for the compiled ones are of other sources than those in csrc/data"
    return compiled, ""


def source_digest(folder: Path) -> str:
    """Tells whether something was compiled from these sources."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
