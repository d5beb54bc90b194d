"""Where a run's directory is put together before anybody sees it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.convert.errors import ConversionError
from megatron.data.staging import staging_folder


def checked_target(target: Path, *, force: bool, to_do: str, source: Path | None = None) -> Path:
    """The absolute path. Raises ConversionError for a place that holds something; `force` allows a directory ("add --force to `to_do` it").

    `source` None: what is there already stays; else it is replaced, and must not hold the source.
    """
    path = Path(os.path.abspath(target))
    if path.exists() and not path.is_dir():
        raise ConversionError(f"{target} is a file: choose another --output_dir.")
    if path.exists() and not force and any(path.iterdir()):
        raise ConversionError(f"{target} is there already: choose another --output_dir, or add --force to {to_do} it.")
    if source is not None and path.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConversionError(f"{target} holds the checkpoint that is to be read: choose another --output_dir.")
    return path


@contextmanager
def staged_run(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to fill and then `move_into` it. Held by one process at a time; what is still in it at the end goes."""
    with staging_folder(target):  # holds the lock; that one takes files alone, and a run has folders
        folder = target.with_name(f".{target.name}.run")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def move_into(folder: Path, target: Path, *, last: str) -> None:
    """Everything in `folder` to `target`, over what has the same name there; `last` is what makes the rest be looked at."""
    if not target.exists():
        os.rename(folder, target)
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        place = target / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
