"""What the system refused, in words: the reason, the file, and the disk that it is on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Failures that are about the disk, so that its name and its room help the reader."""
CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
"""NumPy's words for a disk that is full."""
IN_RUST = re.compile(r"\(os error (\d+)\)")
"""How the libraries tokenizers and safetensors end what the system refused them."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def reason(error: OSError) -> str:
    """Why the system refused. Never empty: some of Python's own OSErrors (shutil's, for one) have no `strerror`."""
    found = number(error)
    return error.strerror or (os.strerror(found) if found is not None else " ".join(str(error).split()) or type(error).__name__)


def number(error: Exception) -> int | None:
    """The system's number (errno) of a failure, also of one that a library put into words of its own; None where it is none of the system's."""
    if isinstance(error, OSError):
        return errno.ENOSPC if error.errno is None and CUT_SHORT.search(str(error)) else error.errno
    found = IN_RUST.search(str(error))
    return int(found[1]) if found else None


def explained(error: OSError, path: Path | str) -> str:
    """The reason; for a failure of the disk also which disk `path` is on and how much room it has."""
    return f"{reason(error)} ({disk(path)})" if number(error) in OF_THE_DISK else reason(error)


def sentence(error: OSError, path: Path | str | None = None) -> str:
    """`FILE: REASON`, without a full stop; the file is the error's own, else `path`. Neither known: the reason alone."""
    where = error.filename if error.filename is not None else path
    if where is None or isinstance(where, int):
        return reason(error)
    name = os.fsdecode(where)
    return f"{name}: {explained(error, name)}"


def disk(path: Path | str) -> str:
    """`disk MOUNT-POINT, 1.5 GiB free`: the mount point of the nearest folder that exists, and the room for this user."""
    place = existing(Path(path))
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return f"disk {mount_point(place)}"
    return f"disk {mount_point(place)}, {in_words(free)} free"


def existing(path: Path) -> Path:
    """The path with its links followed, or the nearest folder above it that exists."""
    real = Path(os.path.realpath(path))
    return next((place for place in (real, *real.parents) if place.exists()), Path(os.sep))


def mount_point(place: Path) -> Path:
    """Where the disk of a path is mounted."""
    return next(folder for folder in (place, *place.parents) if os.path.ismount(folder) or folder == folder.parent)


def in_words(size: int) -> str:
    """`0 bytes`, `17.3 MiB`."""
    number, unit = float(size), 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{size} bytes" if unit == 0 else f"{number:.1f} {UNITS[unit]}"
