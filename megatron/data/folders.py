"""Folders that may be symbolic links: removing them, and saying where a link leads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def remove_folder(path: Path) -> None:
    """Deletes a folder with everything in it. If the folder is a symbolic link, only the link is deleted, and its target stays.

    Does nothing if the folder does not exist. Raises the system's OSError.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def broken_link(path: Path) -> str | None:
    """A sentence (without a full stop) if `path`, or a folder above it, is a symbolic link to a missing place. None: it is not."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a symbolic link to {os.readlink(place)}, which does not exist: mount its disk, make that folder, or remove the link"
    return None
