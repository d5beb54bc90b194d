"""Names of tasks, and where their data come from."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.config.evaluation import EvaluationConfig
from megatron.inference.errors import InferenceError

GROUPS = {"cosmoes": (*("mmlu", "agieval_en", "arc_challenge", "arc_easy", "boolq", "piqa", "social_iqa", "hellaswag", "openbookqa", "winogrande"),)}
"""Names of ours for several tasks. cosmoes: table 2 of "CoSMoEs: Compact Sparse Mixture of Experts" (Huber et al., 2025), zero-shot there."""
OFTEN = ("agieval", "siqa", "super_glue")
"""Folders of tasks whose names do not begin with the folder's."""
SEEDS = (0, 1234, 1234)
"""The harness's seeds of Python's, NumPy's and torch's random numbers. The data of some tasks are shuffled with them."""


def load_tasks(evaluation: EvaluationConfig, *, shown: bool = True) -> dict[str, Any]:
    """The tasks with their data, ready for `lm_eval.evaluator.evaluate`.

    `shown`: bars and prints of the harness may be seen. Raises InferenceError for a name that does not exist, and for data that are not there; all
    of them in one message.
    """
    names, manager = find_tasks(evaluation.eval_tasks or ())
    folder = None if evaluation.eval_data is None else Path(evaluation.eval_data)
    if folder is not None and not folder.is_dir():
        raise InferenceError(f"eval_data: there is no folder {folder}. Name the folder that holds the data of the tasks.")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    missing: dict[str, str] = {}
    with found_in(folder), harness_seeds(), harness_output(shown=shown):
        for name in names:
            try:
                for kind, content in manager.load([name]).items():
                    loaded[kind].update(content)
            except Exception as error:  # each kind of data fails in its own way
                missing[name] = _reason(error)
    if missing:
        raise InferenceError(without_data(missing, folder, [name for name in names if name not in missing]))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InferenceError(f"eval_tasks: {name} runs code that the model writes. Export the model and use lm-eval's own command.")
        set_fewshot(task, evaluation.eval_num_fewshot)
    return loaded


def find_tasks(given: Sequence[str]) -> tuple[list[str], Any]:
    """The harness's names of the tasks, and its manager that knows them.

    The manager would read all of its 14,683 tasks, which takes 13 s of a core (0.4.13). If the names are plain, it reads only the folders that hold
    them. Raises InferenceError for an unknown name.
    """
    from lm_eval.tasks import TaskManager

    plain = list(dict.fromkeys(name for word in given for name in GROUPS.get(word, (word,))))
    folders = [folders_of(name) for name in plain]
    if all(folders):
        manager = TaskManager(include_defaults=False, include_path=sorted({folder for found in folders for folder in found}))
        if all(name in manager.all_tasks for name in plain) and has_members(manager, plain):
            return plain, manager
    manager = every_task()
    return task_names(given, manager.all_tasks), manager


@functools.cache
def every_task() -> Any:
    """The manager of all tasks, made once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@functools.cache
def task_files(folder: Path) -> tuple[tuple[Path, bytes], ...]:
    """The files in `folder` that define tasks, with their text."""
    return tuple((path, path.read_bytes()) for path in folder.rglob("*.yaml"))


def folders_of(name: str) -> set[Path]:
    """The folders with a file that defines a task or group of this name: those near its name if one does, for reading all files takes long too."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__path__[0])
    near = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and (name.startswith(folder.name) or folder.name in OFTEN)]
    line = re.compile(rb"^(?:task|group):\s*[\"\']?" + re.escape(name.encode()) + rb"[\"\']?\s*$", re.MULTILINE)
    found: set[Path] = set()
    for places in (near, [root]):
        found = found or {path.parent for place in places for path, text in task_files(place) if line.search(text)}
    return found


def has_members(manager: Any, names: Sequence[str]) -> bool:
    """Whether the manager knows every member of the groups among `names`, and theirs."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        entry = manager.task_index.get(name)
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task") if isinstance(getattr(entry, "cfg", None), dict) and "group" in entry.cfg else None
        for member in members if isinstance(members, list) else []:
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            if isinstance(inner, str) and inner not in seen:
                seen.add(inner)
                waiting.append(inner)
    return True


def task_names(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """The harness's names for what the user gave: names of ours are replaced, patterns (`arc_*`) are resolved. Raises InferenceError."""
    from lm_eval.utils import pattern_match

    names: list[str] = []
    for name in (name for word in given for name in GROUPS.get(word, (word,))):
        found = [name] if name in known else pattern_match([name], known)
        if not found:
            near = difflib.get_close_matches(name, [*known, *GROUPS], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise InferenceError(f"eval_tasks: lm-evaluation-harness has no task '{name}'{hint} `lm_eval ls tasks` lists all of them.")
        names += found
    return list(dict.fromkeys(names))


def set_fewshot(task: Any, number: int | None) -> None:
    """Sets the number of solved examples, by the harness's own rule: a task that is written for 0 keeps it. None: what the task says, else 0."""
    says = task.get_config("num_fewshot")
    if number is not None and says != 0:
        task.set_config(key="num_fewshot", value=number)
    elif says is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS[-1])


def without_data(missing: dict[str, str], folder: Path | None, others: Sequence[str]) -> str:
    """What to do about tasks whose data cannot be loaded."""
    each = " ".join(f"{name}: {reason}." for name, reason in missing.items())
    where = "" if folder is None else f" in {folder}"
    rest = f" or leave these tasks out: eval_tasks: [{', '.join(others)}]" if others else ""
    way = f"put their data into {folder}" if folder is not None else "connect to the network, name a folder with their data (eval_data)"
    return f"eval_tasks: the data of {len(missing)} task(s) cannot be loaded{where}. {each} To go on, {way}{rest}."


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return (first[0] if first else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def found_in(folder: Path | None) -> Iterator[None]:
    """The package `datasets` looks for data in `folder` first, and not in the network. None: it does as it always does.

    It takes `allenai/ai2_arc` for a folder where the working directory has one of that name, so this is the working directory for the time.
    """
    if folder is None:
        yield
        return
    import datasets
    import huggingface_hub.constants

    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    with contextlib.chdir(folder):
        for module, name in places:
            setattr(module, name, True)
        try:
            yield
        finally:
            for (module, name), value in zip(places, before, strict=True):
                setattr(module, name, value)


@contextlib.contextmanager
def harness_seeds() -> Iterator[None]:
    """The harness's seeds for the time. Afterwards all random numbers go on as if nothing had happened: a training run needs them."""
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)


@contextlib.contextmanager
def without_pools() -> Iterator[None]:
    """The harness draws for its standard errors in this process, and not in a pool of forked ones: gloo's threads do not survive a fork."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def harness_output(*, shown: bool) -> Iterator[None]:
    """Keeps back what the harness says of each step; its bars come only on a terminal, and only if `shown`."""
    import datasets
    import lm_eval.api.metrics as measuring
    import lm_eval.api.task as building

    draw = measuring.bootstrap_stderr

    def draw_quietly(*arguments: Any, **settings: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return draw(*arguments, **settings)

    log, bars = logging.getLogger("lm_eval"), building.tqdm
    level, loads = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    building.tqdm = functools.partial(bars, disable=None if shown else True)
    measuring.bootstrap_stderr = draw_quietly
    try:
        yield
    finally:
        log.setLevel(level)
        building.tqdm = bars
        measuring.bootstrap_stderr = draw
        if not loads:
            datasets.enable_progress_bars()
