"""When checkpoints are saved and which are kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.retention import is_save_iteration, prune
from tests.checkpoint.made import make_checkpoint


def saved(last: int, *arguments: object) -> list[int]:
    return [iteration for iteration in range(last + 1) if is_save_iteration(iteration, *arguments)]  # type: ignore[arg-type]


def test_linear_saves_at_multiples() -> None:
    assert saved(10, 3) == [3, 6, 9]
    assert saved(10, 5.0) == [5, 10]


def test_log_saves_at_powers() -> None:
    assert saved(300, 2, "log") == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for factor in (1.01, 1.5, 2.5, 10, 1.1):
        assert saved(3000, factor, "log") == sorted({int(factor**k) for k in range(int(math.log(3001, factor)) + 1)})


def test_extra_iterations_are_saved_and_only_they_can_name_0() -> None:
    assert saved(10, 4, "linear", [0, 5]) == [0, 4, 5, 8]
    assert saved(10, None, "linear", [7]) == [7]
    assert saved(10, None) == []


@pytest.mark.parametrize(
    ("factor", "scale", "message"),
    [(0, "linear", "must be above 0"), (-3, "linear", "must be above 0"), (1, "log", "must be above 1"), (5, "cubic", "must be linear or log")],
)
def test_bad_factors(factor: float, scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        is_save_iteration(10, factor, scale)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir())


def test_the_oldest_are_deleted_by_number(tmp_path: Path) -> None:
    for iteration in (5, 10, 100, 9):
        make_checkpoint(tmp_path, iteration)
    (tmp_path / "latest").write_text("global_step100")
    assert prune(f"{tmp_path}/", 2) == [tmp_path / "global_step5", tmp_path / "global_step9"]
    assert names(tmp_path) == ["global_step10", "global_step100"]
    assert prune(tmp_path, 2) == []


def test_latest_and_other_programs_checkpoints_stay(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        make_checkpoint(tmp_path, iteration, manifest=iteration != 1)
    (tmp_path / "latest").write_text("global_step2")
    assert prune(tmp_path, 1) == [tmp_path / "global_step3"]
    assert names(tmp_path) == ["global_step1", "global_step2", "global_step4"]


def test_a_killed_deletion_is_finished(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1).rename(layout.deleting(tmp_path, 1))
    make_checkpoint(tmp_path, 2)
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == ["global_step2"]


def test_nothing_to_do(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    assert prune(tmp_path, None) == prune(tmp_path / "nowhere", 3) == []
    with pytest.raises(ValueError, match=r"keep_last_n_checkpoints = 0: must be at least 1"):
        prune(tmp_path, 0)


def test_a_checkpoint_that_cannot_be_deleted(tmp_path: Path) -> None:
    for iteration in (1, 2):
        make_checkpoint(tmp_path, iteration)
    layout.deleting(tmp_path, 1).write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Could not delete old checkpoints in .*keep_last_n_checkpoints = 1\): .*deleting: Not a directory"):
        prune(tmp_path, 1)
