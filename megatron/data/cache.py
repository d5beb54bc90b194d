"""Keeps values that were computed from a data file: beside the data, else in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config import disk

logger = logging.getLogger(__name__)


def cache_directories(data_prefix: Path) -> tuple[Path, Path]:
    """The directories to read from and write to, best first. They need not exist."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return data_prefix.parent / "index_maps", user / "structmoe-neox" / "index_maps"


def cache_key(data_prefix: Path, facts: dict[str, Any]) -> str:
    """A file name that contains everything the content depends on, so that old content has another name."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    return f"{data_prefix.name}-{digest}"


def publish(data_prefix: Path, key: str, write: Callable[[Path], None]) -> Path | None:
    """Lets `write` fill an empty directory, then gives it its name `key` in one step. Returns its path. None: no directory is writable.

    Several processes may do this at once: the first complete directory stays. Contents with the same key are equal.
    """
    for place, directory in enumerate(cache_directories(data_prefix)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=directory))
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s); %s",
                directory,
                disk.explained(error, directory),
                "using the user cache directory" if place == 0 else "keeping in memory",
            )
            continue
        try:
            write(temporary)
            with contextlib.suppress(OSError):  # not empty: another process was first
                os.rename(temporary, directory / key)
            return directory / key
        except OSError as error:
            logger.warning("%s: writing failed (%s)", directory, disk.explained(error, directory))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return None


def find(data_prefix: Path, key: str) -> Path | None:
    """The directory that was published under `key`. None: there is none yet."""
    return next((directory / key for directory in cache_directories(data_prefix) if (directory / key).is_dir()), None)
