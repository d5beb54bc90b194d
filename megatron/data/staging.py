"""A folder that appears complete or not at all. It is filled under a hidden name beside its final place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.data.folders import broken_link, remove_folder
from megatron.data.indexed import DatasetError
from megatron.data.locking import open_locked

LOCK = "lock"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill and then `publish`. One process at a time holds it; the lock ends with the process.

    Files of an interrupted run are deleted first. An exception in the block deletes the folder's files too.
    """
    stage, old = target.with_name(f".{target.name}.partial"), old_folder(target)
    stage.mkdir(parents=True, exist_ok=True)
    try:
        held = open_locked(stage / LOCK)
    except BlockingIOError:
        raise DatasetError(f"another process is preparing {target} right now; wait for it or choose another name") from None
    with held:
        if old.is_dir() and not target.exists():
            os.rename(old, target)  # an earlier run ended between the two renames of `publish`
        with contextlib.suppress(OSError):
            remove_folder(old)
        clear(stage)
        try:
            yield stage
        finally:
            with contextlib.suppress(FileNotFoundError):
                clear(stage)
                (stage / LOCK).unlink()
                stage.rmdir()


def publish(stage: Path, target: Path) -> None:
    """Gives the filled folder its name. An older folder with this name is deleted."""
    for path in stage.rglob("*"):
        if path.name != LOCK and path.is_file():  # closing it here would free it
            with path.open("rb") as file:
                os.fsync(file.fileno())
    (stage / LOCK).unlink()
    old = old_folder(target)
    if target.exists():
        os.rename(target, old)
    os.rename(stage, target)
    with contextlib.suppress(OSError):
        remove_folder(old)


def publish_files(stage: Path, folder: Path) -> None:
    """Moves the filled folder's .bin/.idx pairs into `folder`; other files there stay. Old pairs of the same names are deleted before the first new
    one is
    moved, so that old and new ones never exist together."""
    pairs = sorted(path.with_suffix("") for path in stage.glob("*.idx"))
    for pair in pairs:
        (folder / f"{pair.name}.idx").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        for pair in pairs:
            os.replace(f"{pair}{suffix}", folder / f"{pair.name}{suffix}")


def old_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def clear(stage: Path) -> None:
    for path in stage.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def followed(target: Path) -> Path:
    """The target of a link, so that new data go to the disk that the user chose. A path without a link stays as it is. Raises DatasetError for a
    link to
    a missing place."""
    if (nowhere := broken_link(target)) is not None:
        raise DatasetError(nowhere)
    return target.resolve() if target.is_symlink() else target


def check_replaceable(target: Path, ours: Collection[str]) -> None:
    """Raises DatasetError if `target` holds files other than `ours`, so that a user's own files are never deleted."""
    if target.exists() and not target.is_dir():
        raise DatasetError(f"{target} is a file; choose another --name or directory (-d)")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in ours) if target.exists() else []
    if foreign:
        raise DatasetError(f"{target} holds {foreign[0]}, which prepare_data.py did not write; move it away or choose another --name")
