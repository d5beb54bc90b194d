"""Which steps are saved, and which checkpoints are kept."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.manifest import read_manifest, sync_directory, write_bytes
from megatron.config import disk
from megatron.data.folders import remove_folder


def is_save_iteration(iteration: int, factor: float | None, scale: str = "linear", extra: Collection[int] | None = None) -> bool:
    """Whether NeoX saves at this iteration (`checkpoint_factor`, `checkpoint_scale`, `extra_save_iters`).

    linear: multiples of `factor`; log: int(factor ** k) for k = 0, 1, 2, ...; iteration 0 only when `extra` names it. No factor: only `extra`.
    """
    if extra is not None and iteration in extra:
        return True
    if factor is None or iteration < 1:
        return False
    if scale == "linear":
        if factor <= 0:
            raise ValueError(
                f"checkpoint_factor = {factor}: must be above 0 (with checkpoint_scale linear, a checkpoint is saved every "
                "checkpoint_factor iterations)."
            )
        return iteration % factor == 0
    if scale == "log":
        if factor <= 1:
            raise ValueError(f"checkpoint_factor = {factor}: must be above 1 (with checkpoint_scale log, a checkpoint is saved at its powers).")
        nearest = round(math.log(iteration) / math.log(factor))
        # The smallest power that reaches `iteration` decides; a logarithm's rounding may miss it by one.
        power = next(k for k in range(max(nearest - 1, 0), nearest + 3) if factor**k >= iteration)
        return int(factor**power) == iteration
    raise ValueError(f"checkpoint_scale = {scale!r}: must be linear or log.")


def prune(directory: Path | str, keep_last_n: int | None) -> list[Path]:
    """Deletes our checkpoints but the newest `keep_last_n` (None keeps all), oldest step first, and returns the deleted paths. One rank calls it.

    Other programs' checkpoints (no manifest), the one `latest` names and the newest one whose losses were all finite are never touched. Of one that
    is a symbolic link the link goes, and what it leads to stays. A killed deletion is finished by the next call.
    Raises CheckpointError when a checkpoint cannot be deleted.
    """
    directory = Path(directory)
    if keep_last_n is None or not directory.is_dir():
        return []
    if keep_last_n < 1:
        raise ValueError(f"keep_last_n_checkpoints = {keep_last_n}: must be at least 1.")
    try:
        return _delete_old(directory, keep_last_n)
    except OSError as error:
        raise CheckpointError(
            f"Could not delete old checkpoints in {directory} (keep_last_n_checkpoints = {keep_last_n}): {disk.sentence(error, directory)}."
        ) from error


def _delete_old(directory: Path, keep_last_n: int) -> list[Path]:
    for leftover in directory.glob(".global_step*.deleting"):
        remove_folder(leftover)
    latest = directory / layout.LATEST
    ours = _ours(directory)
    named = latest.resolve().name if latest.is_dir() else latest.read_text(errors="replace").strip() if latest.is_file() else None
    protected = {named, layout.tag(_last_good(directory, ours))}
    doomed = [step for step in ours[:-keep_last_n] if layout.tag(step) not in protected]
    for step in doomed:
        os.replace(directory / layout.tag(step), layout.deleting(directory, step))
        sync_directory(directory)
        remove_folder(layout.deleting(directory, step))
    return [directory / layout.tag(step) for step in doomed]


def _ours(directory: Path) -> list[int]:
    return [step for step in layout.iterations_in(directory) if (directory / layout.tag(step) / layout.MANIFEST).is_file()]


def _last_good(directory: Path, steps: list[int]) -> int:
    """The highest of `steps` whose losses were finite as far as is known; -1 when there is none."""
    for step in reversed(steps):
        manifest = read_manifest(directory / layout.tag(step))
        if manifest is not None and manifest.facts.get(layout.LOSSES_FINITE) is not False:
            return step
    return -1


def set_aside(directory: Path, iteration: int) -> Path | None:
    """Moves a checkpoint that turned out to be bad into <directory>/suspect, in the place of what is there; `latest` names the newest one left.

    Returns that one, or None when none is left. One rank calls it. Raises CheckpointError.
    """
    path, suspect = directory / layout.tag(iteration), directory / layout.SUSPECT
    left = [step for step in _ours(directory) if step != iteration]
    latest = directory / layout.LATEST
    try:
        if left:
            write_bytes(latest.with_name(f".{layout.LATEST}"), layout.tag(left[-1]).encode())
            os.replace(latest.with_name(f".{layout.LATEST}"), latest)
        else:
            latest.unlink(missing_ok=True)
        remove_folder(suspect)
        suspect.mkdir()
        os.replace(path, suspect / path.name)
        write_bytes(suspect / layout.LATEST, path.name.encode())
        sync_directory(directory)
    except OSError as error:
        raise CheckpointError(f"Could not move {path} into {suspect}: {disk.sentence(error, directory)}.") from error
    return directory / layout.tag(left[-1]) if left else None
