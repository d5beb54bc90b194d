"""Run directories and checkpoints that are symbolic links, as people have them who move old checkpoints to another disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError, RunLockError
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.lock import RunLock
from megatron.checkpoint.retention import prune
from megatron.checkpoint.save import commit, prepare
from tests.checkpoint.made import make_checkpoint


def save(directory: Path, iteration: int) -> Path:
    """A small checkpoint through the doors that every save goes through."""
    prepare(directory)
    staged = layout.staging(directory) / layout.tag(iteration)
    staged.mkdir()
    (staged / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    commit(directory, staged, {}, {}, {"iteration": iteration})
    return directory / layout.tag(iteration)


def moved(directory: Path, iteration: int, elsewhere: Path, *, relative: bool) -> Path:
    """The checkpoint, moved elsewhere, with a link in its place."""
    path = save(directory, iteration)
    elsewhere.mkdir(exist_ok=True)
    target = path.rename(elsewhere / path.name)
    path.symlink_to(os.path.relpath(target, directory) if relative else target)
    return target


@pytest.mark.parametrize("relative", [False, True])
def test_a_checkpoint_that_was_moved_away_stays_there(tmp_path: Path, relative: bool) -> None:
    target = moved(tmp_path / "run", 1, tmp_path / "elsewhere", relative=relative)
    save(tmp_path / "run", 2)
    assert find_checkpoint(tmp_path / "run", 1) == tmp_path / "run/global_step1"
    assert prune(tmp_path / "run", 1) == [tmp_path / "run/global_step1"]
    assert not os.path.lexists(tmp_path / "run/global_step1")
    assert (target / "manifest.json").is_file()
    assert not [entry for entry in (tmp_path / "run").iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_replaced_by_a_new_checkpoint_of_its_step(tmp_path: Path, dangling: bool) -> None:
    target = moved(tmp_path / "run", 1, tmp_path / "elsewhere", relative=False)
    if dangling:
        target.rename(tmp_path / "gone")
    for _ in range(2):
        save(tmp_path / "run", 1)
    assert not (tmp_path / "run/global_step1").is_symlink()
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/global_step1"
    assert dangling or (target / "manifest.json").is_file()


@pytest.mark.parametrize("name", [".incomplete", ".global_step1.replaced", ".global_step1.deleting"])
def test_links_that_an_earlier_version_left_are_cleared(tmp_path: Path, name: str) -> None:
    save(tmp_path / "run", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "run", 2)
    prune(tmp_path / "run", 2)
    assert not os.path.lexists(tmp_path / "run" / name)
    assert (tmp_path / "elsewhere").is_dir()


def test_a_run_directory_that_is_a_link_to_another_disk(tmp_path: Path, small_disk: Path | None) -> None:
    (tmp_path / "run").symlink_to(small_disk or tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    for iteration in (1, 1, 2, 3):
        save(tmp_path / "run", iteration)
    prune(tmp_path / "run", 1)
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/global_step3"
    assert (tmp_path / "run").is_symlink()


def locked(directory: Path) -> None:
    with RunLock(directory):
        pass


@pytest.mark.parametrize(("work", "error"), [(prepare, CheckpointError), (locked, RunLockError), (find_checkpoint, CheckpointError)])
@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_directory_that_is_a_link_to_nowhere(tmp_path: Path, below: str, work: Callable[[Path], object], error: type[Exception]) -> None:
    (tmp_path / "run").symlink_to("not-mounted/run")
    with pytest.raises(error, match=r"run is a symbolic link to not-mounted/run, which does not exist: mount its disk, make that folder"):
        work(tmp_path / "run" / below)
    assert not (tmp_path / "not-mounted").exists()


def test_latest_may_be_a_link(tmp_path: Path) -> None:
    for iteration in (1, 2):
        make_checkpoint(tmp_path, iteration)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("global_step1")
    assert find_checkpoint(tmp_path) == tmp_path / "global_step1", "a link to the checkpoint itself"
    assert prune(tmp_path, 1) == []
    save(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "global_step3"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"latest is a symbolic link to gone, which does not exist.*add `-o iteration=3`"):
        find_checkpoint(tmp_path)
