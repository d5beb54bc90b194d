"""Folders that may be symbolic links: removing them, and saying where a link leads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def remove_folder(path: Path) -> None:
    """Deletes a folder with everything in it; of a symbolic link only the link, so that what somebody keeps elsewhere stays there.

    Does nothing where there is nothing. Raises the system's OSError.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def broken_link(path: Path) -> str | None:
    """A sentence (without a full stop) when `path`, or a folder above it, is a symbolic link that leads nowhere; None when it is not."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a symbolic link to {os.readlink(place)}, which is not there: mount its disk, make that folder, or remove the link"
    return None
