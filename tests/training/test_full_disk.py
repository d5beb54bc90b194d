"""Files beside the checkpoints that the disk refuses: the run saves, says which file on which disk, and does not end with status 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.find import find_checkpoint
from megatron.config.loader import LoadedConfig
from megatron.monitor.guarded import OutputFailed
from megatron.monitor.jsonl import read_jsonl
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import tiny_config
from tests.conftest import DISK_BYTES
from tests.training.runs import run_values, train_losses


def fill(disk: Path, *, left: int) -> None:
    (disk / "filling").write_bytes(b"x" * (DISK_BYTES - left))


@pytest.fixture
def disk(small_disk: Path | None) -> Path:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    return small_disk


def test_a_line_of_metrics_that_does_not_fit(corpus: Path, tmp_path: Path, disk: Path) -> None:
    fill(disk, left=4096)
    metrics = disk / "metrics.jsonl"
    values = run_values(corpus, tmp_path / "run", train_iters=40, eval_iters=0, checkpoint_factor=1000, metrics_file=str(metrics))
    with pytest.raises(OutputFailed) as raised:
        train_losses({**values, "plot_file": str(tmp_path / "training.png")})
    steps = [record["iteration"] for record in read_jsonl(metrics)]
    saved = find_checkpoint(tmp_path / "run")
    assert saved == tmp_path / f"run/global_step{steps[-1] + 1}", "the step whose line did not fit is saved"
    assert str(raised.value).startswith(f"{metrics}: No space left on device (disk {disk}, ")
    assert str(raised.value).endswith(f"The last good checkpoint is {saved}. Free space or choose another disk, then start again.")
    assert metrics.read_text().endswith("}\n"), "no half line"
    (disk / "filling").unlink()
    train_losses({**values, "resume_if_exists": True})
    lost = steps[-1] + 1
    assert [record["iteration"] for record in read_jsonl(metrics)] == [step for step in range(1, 41) if step != lost], "it goes on from there"


def test_a_checkpoint_that_does_not_fit_either(corpus: Path, disk: Path) -> None:
    fill(disk, left=8192)
    with pytest.raises(CheckpointError, match=r"Could not save .*global_step\d+: No space left on device \(disk "):
        train_losses(run_values(corpus, disk / "run", train_iters=40, eval_iters=0, checkpoint_factor=1000))


@pytest.mark.parametrize(
    ("keys", "file"),
    [
        ({"log_dir": "D"}, "_rank_00_stdout.txt"),
        ({"plot_file": "D/training.png"}, "training.png"),
        ({"profile": True, "profile_step_start": 1, "profile_step_stop": 2, "log_dir": "D"}, ".pt.trace.json"),
        ({"tensorboard_dir": "D/tb"}, "tb"),
    ],
    ids=["log_dir", "plot_file", "trace_dir", "tensorboard_dir"],
)
def test_other_files_that_do_not_fit(
    corpus: Path, tmp_path: Path, disk: Path, keys: Mapping[str, Any], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(disk, left=65536 if "profile" in keys else 4096)
    if "tensorboard_dir" in keys:
        pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    placed = {key: value.replace("D", str(disk)) if isinstance(value, str) else value for key, value in keys.items()}
    values = run_values(corpus, tmp_path / "run", train_iters=30, eval_iters=0, checkpoint_factor=1000, log_interval=1, **placed)
    with pytest.raises(OutputFailed, match=rf"(?s)^{disk}.*{file}: .*\(disk {disk}, .* free\)\. The last good checkpoint is .*global_step\d+"):
        train_losses(values)
    assert find_checkpoint(tmp_path / "run")
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


def outcome(values: Mapping[str, Any]) -> tuple[str, int]:
    from megatron.training.run import train

    try:
        return "", train(LoadedConfig(tiny_config(values))).exit_status
    except OutputFailed as error:
        return str(error), 1


def test_the_other_processes_stop_at_the_same_step(corpus: Path, tmp_path: Path, disk: Path) -> None:
    fill(disk, left=4096)
    values = run_values(corpus, tmp_path / "run", train_iters=40, eval_iters=0, checkpoint_factor=1000, train_batch_size=4)
    first, second = run_distributed(outcome, 2, {**values, "metrics_file": str(disk / "m.jsonl"), "plot_file": str(tmp_path / "p.png")}, backend=None)
    assert f"{disk / 'm.jsonl'}: No space left on device" in first[0]
    assert second == ("", 1)
    assert 0 < json.loads((find_checkpoint(tmp_path / "run") / "manifest.json").read_text())["iteration"] < 40
