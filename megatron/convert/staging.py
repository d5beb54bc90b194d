"""Where a run's directory is put together before anybody sees it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from megatron.checkpoint import layout
from megatron.convert.errors import ConversionError
from megatron.convert.json_files import read_json, write_json
from megatron.data.folders import broken_link, remove_folder
from megatron.data.staging import LOCK, staging_folder

RECORD = ".written.json"
WRITER, IMPORTER = "convert_neox_to_hf.py", "convert_hf_to_neox.py"


def checked_target(target: Path, *, force: bool, to_do: str, source: Path | None = None) -> Path:
    """The absolute path. Raises ConversionError for a place that holds something; `force` allows a directory ("add --force to `to_do` it").

    `source` None: what is there already stays; else it is replaced, and must not hold the source.
    """
    if (nowhere := broken_link(target)) is not None:
        raise ConversionError(f"{nowhere}, or choose another --output_dir.")
    path = Path(os.path.realpath(target))  # where a link leads: what is put together lies beside that
    if path.exists() and not path.is_dir():
        raise ConversionError(f"{target} is a file, not a directory: choose another --output_dir.")
    if path.exists() and not force and any(path.iterdir()):
        raise ConversionError(f"{target} already exists: choose another --output_dir, or add --force to {to_do} it.")
    if source is not None and path.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConversionError(f"{target} holds the checkpoint that is read: choose another --output_dir.")
    return path


def write_record(stage: Path) -> None:
    """The names of what an export wrote, so that `--force` replaces that and nothing else."""
    write_json(stage / RECORD, {"written_by": WRITER, "files": sorted(name for name in _contents(stage) if name != LOCK)})


def check_written_by_export(target: Path) -> None:
    """Raises ConversionError when `target` holds anything that an export did not write: nobody's notes are deleted here."""
    if not target.exists():
        return
    record = read_json(target / RECORD)
    ours = {RECORD, *record.get("files", ())} if record.get("written_by") == WRITER else set()
    parents = {str(parent) for name in ours for parent in PurePath(name).parents}
    foreign = (name for name in _contents(target, folders=True) if name not in ours and name not in parents)
    _refuse_foreign(target, foreign, WRITER)


def _contents(folder: Path, *, folders: bool = False) -> Iterator[str]:
    """The names of the files in a folder and in those below it, from there on; with `folders` the names of those too."""
    for path in folder.rglob("*"):
        if folders or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def check_holds_no_run(target: Path, config: str, head: str) -> None:
    """Raises ConversionError when `target` holds a run's checkpoints or configuration, which an import would write over.

    What an earlier import wrote may be replaced: it is known by its `config`, which begins with `head`.
    """
    if not target.is_dir():
        return
    imported = (target / config).is_file() and (target / config).read_text(errors="replace").startswith(head)
    steps = [layout.tag(step) for step in layout.iterations_in(target) if step or not imported]
    others = [name for name in (layout.LATEST, config) if (target / name).exists() and not imported]
    _refuse_foreign(target, [*steps, *others], IMPORTER)


def _refuse_foreign(target: Path, names: Iterable[str], writer: str) -> None:
    foreign = min(names, default=None)
    if foreign is not None:
        raise ConversionError(f"{target} holds {foreign}, which {writer} did not write: move it to another place, or choose another --output_dir.")


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
    """Everything in `folder` to `target`, over what an earlier import has put there; `last` is what makes the rest be looked at."""
    if not target.exists():
        os.rename(folder, target)
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        place = target / path.name
        if place.is_dir():
            remove_folder(place)
        os.replace(path, place)
