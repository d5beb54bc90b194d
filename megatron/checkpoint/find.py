"""Which checkpoint to load: the one that `latest` names, or the one of a given step. Every file is checked byte for byte. If it cannot be loaded,
the error says what is there instead."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.checkpoint.manifest import damage
from megatron.data.folders import broken_link

MAX_LISTED = 12


def find_checkpoint(directory: Path | str, iteration: int | None = None) -> Path:
    """The checkpoint of `iteration` under `directory`, or the one `latest` names (without `latest`, the newest whole one); every file is checked.

    Raises NoCheckpointError when there is none at all (also when the directory is missing), CheckpointError when the one asked for is missing or
    damaged, naming the newest whole one. A checkpoint without our manifest (GPT-NeoX's own) is taken as it is.
    """
    directory = Path(directory)
    if (nowhere := broken_link(directory)) is not None:
        raise CheckpointError(f"{nowhere}.")
    if not directory.is_dir():
        raise NoCheckpointError(f"{directory} does not exist, so there is no checkpoint to load. {_neighbours(directory)}")
    if layout.looks_like_checkpoint(directory):
        raise CheckpointError(
            f"{directory} is a checkpoint itself. Give the directory that holds it, {directory.parent}, and add `-o iteration=N` to "
            "choose a checkpoint."
        )
    steps = layout.iterations_in(directory)
    if iteration is not None:
        return _find_step(directory, iteration, steps)
    latest = directory / layout.LATEST
    if (nowhere := broken_link(latest)) is not None:
        raise CheckpointError(f"{nowhere}. {_offer(directory, steps)}")
    if latest.exists():
        return _find_latest(directory, latest, steps)
    if not steps:
        raise NoCheckpointError(
            f"{directory} holds no checkpoint (no `{layout.LATEST}`, no {layout.tag(0)[:-1]}N). {_unfinished(directory)}{_entries(directory)}"
        )
    newest = newest_whole(directory, steps)
    if newest is None:
        raise CheckpointError(f"Every checkpoint in {directory} is damaged or incomplete: {_problem(layout.path_of(directory, steps[-1]))}")
    return layout.path_of(directory, newest)


def find_checkpoint_together(directory: Path | str, iteration: int | None = None) -> Path:
    """`find_checkpoint` for all ranks of a run: rank 0 reads and checks the files, every rank gets the path or the error. Collective."""
    path = ranks.together(lambda: find_checkpoint(directory, iteration), only_rank=0)
    found = ranks.gather(path)[0]
    assert found is not None
    return found


def newest_whole(directory: Path, steps: list[int]) -> int | None:
    """The highest of `steps` whose files are all there and undamaged; None when there is none."""
    return next((step for step in reversed(steps) if not _problem(layout.path_of(directory, step))), None)


def _find_step(directory: Path, iteration: int, steps: list[int]) -> Path:
    if not steps:
        raise NoCheckpointError(
            f"{directory} holds no checkpoint, so it does not hold the one of iteration {iteration}. {_unfinished(directory)}{_entries(directory)}"
        )
    if iteration not in steps:
        raise CheckpointError(f"{directory} holds no checkpoint of iteration {iteration}. It holds: {_listed(steps)}.")
    path = layout.path_of(directory, iteration)
    problem = _problem(path)
    if problem:
        raise CheckpointError(f"{problem} {_offer(directory, [step for step in steps if step != iteration])}")
    return path


def _find_latest(directory: Path, latest: Path, steps: list[int]) -> Path:
    name = latest.resolve().name if latest.is_dir() else latest.read_text(errors="replace").strip()  # a link to the checkpoint itself will do
    step = layout.iteration_of(name)
    path = layout.path_of(directory, step) if step is not None else directory / name
    if not name or not name.isprintable() or Path(name).name != name:
        raise CheckpointError(f"{latest} holds {name[:80]!r}, which is not the name of a directory beside it. {_offer(directory, steps)}")
    if not path.is_dir():
        raise CheckpointError(f"{latest} names {name}, which is missing. {_unfinished(directory)}{_offer(directory, steps)}")
    problem = _problem(path)
    if problem:
        raise CheckpointError(
            f"{latest} names {name}, which is damaged or incomplete: {problem} {_offer(directory, [other for other in steps if other != step])}"
        )
    return path


def _problem(path: Path) -> str:
    """What is wrong with the files of a checkpoint, the first two problems in full; empty when it is whole."""
    if not layout.looks_like_checkpoint(path):
        problems = damage(path) or [f"{path} is incomplete: it holds no model weights (mp_rank_00_model_states.pt)."]
    else:
        problems = damage(path)
    more = f" {len(problems) - 2} more files are damaged." if len(problems) > 2 else ""
    return " ".join(problems[:2]) + more


def _offer(directory: Path, steps: list[int]) -> str:
    newest = newest_whole(directory, steps)
    if newest is None:
        return f"{directory} holds no other undamaged checkpoint."
    return f"The newest undamaged checkpoint is that of iteration {newest}. To continue from it, add `-o iteration={newest}`."


def _unfinished(directory: Path) -> str:
    staging = layout.staging(directory)
    names = sorted(entry.name for entry in staging.iterdir()) if staging.is_dir() else []
    unfinished = [name for name in names if layout.iteration_of(name) is not None]
    return f"Saving {', '.join(unfinished)} was interrupted. " if unfinished else ""


def _entries(directory: Path) -> str:
    """What is there instead: directories with checkpoints in them, else everything."""
    entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    runs = [entry.name for entry in entries if entry.is_dir() and ((entry / layout.LATEST).is_file() or layout.iterations_in(entry))]
    if runs:
        return f"There are checkpoints in these directories below it: {_shortened(runs)}. Give one of them."
    return f"It holds: {_shortened([entry.name for entry in entries])}." if entries else "It is empty."


def _neighbours(directory: Path) -> str:
    """Where the path ends to exist, and what is there."""
    parent = next(parent for parent in directory.absolute().parents if parent.is_dir())
    return f"{parent} exists. {_entries(parent)}"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"


def _listed(steps: list[int]) -> str:
    if len(steps) <= MAX_LISTED:
        return ", ".join(str(step) for step in steps)
    half = MAX_LISTED // 2
    return f"{', '.join(map(str, steps[:half]))}, ... ({len(steps)} in all), {', '.join(map(str, steps[-half:]))}"
