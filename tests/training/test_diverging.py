"""Runs whose loss is NaN or infinite: what is kept, what the last words say, and with what status they end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.finite import not_finite
from megatron.checkpoint.manifest import read_manifest
from megatron.testing.distributed import run_distributed
from megatron.training.callbacks import evaluate as evaluating
from megatron.training.health import TrainingDiverged
from tests.training.runs import run_values, train_losses, train_with_bad_losses


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir())


def bad(*steps: int) -> dict[int, float]:
    return dict.fromkeys((step - 1 for step in steps), math.nan)


def test_a_checkpoint_that_falls_on_skipped_steps_waits_for_a_good_one(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=14, eval_iters=0, keep_last_n_checkpoints=1, checkpoint_factor=3)
    train_with_bad_losses(values, bad(6, 7, 10))
    printed = capsys.readouterr().out
    why = "step 6 changed nothing, because the loss is nan"
    assert f"suspect/global_step6 and does not become the latest checkpoint: {why}" in printed.replace("\n", "")
    assert "global_step8 in" in printed
    assert (tmp_path / "run/latest").read_text() == "global_step14"
    assert names(tmp_path / "run") == ["global_step14"], "what was in doubt is not any more"


def test_the_last_one_with_finite_losses_is_kept(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=12, eval_iters=0, keep_last_n_checkpoints=1, checkpoint_factor=3)
    train_with_bad_losses(values, bad(5, 8, 11))
    assert names(tmp_path / "run") == ["global_step12", "global_step3"], "between the others there was a NaN each"
    manifest = read_manifest(tmp_path / "run/global_step12")
    assert manifest is not None
    assert manifest.facts["losses_finite"] is False


@pytest.mark.parametrize("keep", [1, None])
def test_a_run_that_ends_in_skipped_steps(corpus: Path, tmp_path: Path, keep: int | None) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=12, eval_iters=0, keep_last_n_checkpoints=keep, checkpoint_factor=2)
    expected = r"ended at step 12 and is not good: the 7 steps up to 12 changed nothing.*The last good checkpoint is .*global_step4\.$"
    with pytest.raises(TrainingDiverged, match=expected):
        train_with_bad_losses(values, bad(*range(6, 13)))
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/global_step4"
    assert names(tmp_path / "run/suspect") == ["global_step12"]
    resumed = train_losses({**values, "resume_if_exists": True})
    assert len(resumed) == 12
    assert None not in resumed


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_last_evaluation_that_is_no_number(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The weights train well and give NaN on held-out text: what was saved before the evaluation is moved aside."""
    original, calls = evaluating.evaluate, []

    def evaluate(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        found = original(*args, **settings)
        return found._replace(loss=math.nan) if len(calls) == {"validation": 1, "test": 2}[name] else found

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    values = run_values(corpus, tmp_path / "run", train_iters=6, eval_iters=1, eval_interval=100, keep_last_n_checkpoints=1, checkpoint_factor=3)
    with pytest.raises(TrainingDiverged, match=rf"the {name} loss at step 6 is nan\. The last good checkpoint is .*global_step3\.$"):
        train_losses(values)
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/global_step3"
    assert find_checkpoint(tmp_path / "run/suspect").name == "global_step6"


@pytest.mark.parametrize(("stage", "rate", "suspect"), [*((stage, 1e39, []) for stage in range(4)), (0, 1e30, ["global_step1"])])
def test_weights_that_are_no_use_are_never_the_latest(corpus: Path, tmp_path: Path, stage: int, rate: float, suspect: list[str]) -> None:
    """One step of such a rate makes weights infinite, or so large that they give NaN. Its own loss, of the weights before, is finite."""
    values = run_values(corpus, tmp_path / "run", zero_optimization={"stage": stage}, checkpoint_factor=8, eval_iters=0, max_nonfinite_steps=3)
    with pytest.raises(TrainingDiverged, match=r"There is no checkpoint to go back to\."):
        train_losses({**values, "optimizer": {"type": "Adam", "params": {"lr": rate}}, "extra_save_iters": [1]})
    assert not (tmp_path / "run/latest").exists()
    assert names(tmp_path / "run") == (["suspect"] if suspect else [])
    assert not suspect or names(tmp_path / "run/suspect") == suspect


def test_a_run_whose_last_step_ruins_the_weights_does_not_end_well(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=1, eval_iters=0, checkpoint_factor=1)
    with pytest.raises(
        TrainingDiverged, match=r"ended at step 1 and is not good: sequential\..* holds numbers that are NaN or infinite\. There is no"
    ):
        train_losses({**values, "optimizer": {"type": "Adam", "params": {"lr": 1e39}}})


def test_a_checkpoint_in_doubt_that_does_not_fit_ends_no_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/suspect").write_text("no folder")
    values = run_values(corpus, tmp_path / "run", train_iters=6, eval_iters=0, checkpoint_factor=3)
    train_with_bad_losses(values, bad(3))
    assert names(tmp_path / "run") == ["global_step4", "global_step6"]


def weight_of_one_process_is_spoiled(stage: int, spoiled_rank: int) -> str | None:
    import torch

    from megatron.checkpoint.finite import held_part
    from tests.checkpoint import toy

    engine = toy.build_engine(stage)
    if torch.distributed.get_rank() == spoiled_rank:
        parameter = list(engine.module.parameters())[1]
        held_part(parameter).data.flatten()[:1] = math.inf
    return not_finite(engine.module)


@pytest.mark.parametrize("stage", [0, 3])
def test_one_process_with_a_bad_weight_is_enough(stage: int) -> None:
    assert run_distributed(weight_of_one_process_is_spoiled, 2, stage, -1) == [None, None]
    first, second = run_distributed(weight_of_one_process_is_spoiled, 2, stage, 1)
    assert first == second
    assert first is not None
