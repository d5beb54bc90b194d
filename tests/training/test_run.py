"""Whole runs on one process: ZeRO stages, resuming, skipping, refusing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.errors import CheckpointError, RunLockError
from megatron.checkpoint.lock import RunLock
from megatron.config.section import ConfigError
from megatron.testing.tiny import TINY_DENSE
from megatron.training.health import TrainingDiverged
from tests.training.runs import losses_of, run_values, train_losses, train_with_bad_losses


def test_loss_falls_and_everything_is_written(corpus: Path, tmp_path: Path) -> None:
    losses = train_losses(run_values(corpus, tmp_path / "run", train_iters=40), picture=True)
    assert losses[-1] < 0.6 * losses[0]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"global_step4", "global_step40", "latest", "metrics.jsonl", "training.png"}
    assert (tmp_path / "run/training.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    loads = next(record["moe/expert_load"] for record in records if "moe/expert_load" in record)
    assert [sum(layer) for layer in loads] == [2 * 16 * 2] * 2, "2 sequences of 16 tokens, 2 experts a token, 2 layers"
    lore_loads = next(record["moe/lore_load"] for record in records if "moe/lore_load" in record)
    assert [sum(layer) for layer in lore_loads] == [2 * 16 * 2 * 2] * 2, "two LoREs for each of them"
    assert {"validation/lm_loss", "test/lm_loss"} <= {key for record in records for key in record}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree(corpus: Path, tmp_path: Path, stage: int) -> None:
    expected = train_losses(run_values(corpus, tmp_path / "0"))
    assert train_losses(run_values(corpus, tmp_path / "n", zero_optimization={"stage": stage})) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("untied", [True, False])
def test_zero_3_may_cut_up_every_parameter(corpus: Path, tmp_path: Path, untied: bool) -> None:
    """DeepSpeed leaves parameters as small as a test's whole unless told otherwise."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    expected = train_losses(run_values(corpus, tmp_path / "0", no_weight_tying=untied))
    assert train_losses(run_values(corpus, tmp_path / "3", no_weight_tying=untied, zero_optimization=zero)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_trains_and_follows_fp32(corpus: Path, tmp_path: Path, stage: int) -> None:
    values = run_values(corpus, None, train_iters=5, eval_iters=0, optimizer={"type": "Adam", "params": {"lr": 1e-3}})
    expected = train_losses({**values, "metrics_file": str(tmp_path / "fp32.jsonl")})
    losses = train_losses({**values, "precision": "bfloat16", "zero_optimization": {"stage": stage}, "metrics_file": str(tmp_path / "bf16.jsonl")})
    assert losses == pytest.approx(expected, rel=0.02)


def test_recomputed_activations_change_nothing(corpus: Path, tmp_path: Path) -> None:
    expected = train_losses(run_values(corpus, tmp_path / "kept"))
    assert train_losses(run_values(corpus, tmp_path / "recomputed", checkpoint_activations=True)) == expected


def test_accumulation_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    values = {**run_values(corpus, None), **dict.fromkeys(("moe_losses", "moe_expert_type", "moe_num_experts")), "train_batch_size": 4}
    values = {key: value for key, value in values.items() if key in TINY_DENSE or not key.startswith("moe_")}
    whole = train_losses({**values, "train_micro_batch_size_per_gpu": 4, "metrics_file": str(tmp_path / "a.jsonl")})
    parts = train_losses({**values, "train_micro_batch_size_per_gpu": 1, "metrics_file": str(tmp_path / "b.jsonl")})
    assert parts == pytest.approx(whole, abs=2e-4)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_run_is_bit_for_bit_the_same(corpus: Path, tmp_path: Path, stage: int) -> None:
    values = run_values(corpus, tmp_path / "a", zero_optimization={"stage": stage}, hidden_dropout=0.1, attention_dropout=0.1)
    expected = train_losses(values)
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    assert train_losses({**halves, "exit_interval": 5}) == expected[:5]
    assert train_losses(halves) == expected
    for key in ("validation/lm_loss", "test/lm_loss"):
        assert losses_of(tmp_path / "b/metrics.jsonl", key) == losses_of(tmp_path / "a/metrics.jsonl", key)
    weights = [(tmp_path / name / "global_step8/mp_rank_00_model_states.pt").stat().st_size for name in "ab"]
    assert weights[0] == weights[1]


def test_a_finished_run_trains_no_further(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", resume_if_exists=True)
    assert train_losses(values) == train_losses(values)


def test_own_optimizer_settings_win_over_the_checkpoints(corpus: Path, tmp_path: Path) -> None:
    from megatron.config.loader import LoadedConfig
    from megatron.testing.tiny import tiny_config
    from megatron.training.run import train

    values = run_values(corpus, tmp_path / "run", resume_if_exists=True)
    train_losses({**values, "exit_interval": 4})
    trainer = train(LoadedConfig(tiny_config({**values, "weight_decay": 0.3})))
    assert {group["weight_decay"] for group in trainer.engine.optimizer.param_groups} == {0.0, 0.3}


def test_finetune_takes_only_the_weights(corpus: Path, tmp_path: Path) -> None:
    first = train_losses(run_values(corpus, tmp_path / "a", train_iters=40))
    second = train_losses(run_values(corpus, tmp_path / "b", load=str(tmp_path / "a"), finetune=True))
    assert len(second) == 8, "it starts at step 0"
    assert second[0] < 0.7 * first[0]


@pytest.mark.parametrize(
    ("stage", "precision", "bad"),
    [*((stage, "fp32", bad) for stage in (0, 1, 2, 3) for bad in (math.nan, math.inf)), *((stage, "bfloat16", math.nan) for stage in (0, 1, 2))],
)
def test_a_step_that_is_not_finite_is_skipped(corpus: Path, tmp_path: Path, stage: int, precision: str, bad: float) -> None:
    values = run_values(corpus, tmp_path / "run", zero_optimization={"stage": stage}, precision=precision, eval_iters=0)
    losses = train_with_bad_losses(values, {2: bad})
    assert losses[2] is None
    assert all(loss is not None and loss < 20 for number, loss in enumerate(losses) if number != 2)
    assert losses_of(tmp_path / "run/metrics.jsonl", "runtime/skipped_iterations") == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_streak_stops_the_run_and_names_the_last_checkpoint(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", max_nonfinite_steps=3, train_iters=20, eval_iters=0)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .* up to step 8\. The last good checkpoint is .*global_step4"):
        train_with_bad_losses(values, dict.fromkeys(range(5, 20), math.nan))
    values["load"] = values["save"]
    assert len(train_losses(values)) == 20, "from the last good checkpoint it goes on"


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'data_path' or 'train_data_paths' must be given"):
        train_losses({**TINY_DENSE, "metrics_file": "unused.jsonl"})


def test_a_second_run_in_the_same_directory_is_refused(corpus: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"), pytest.raises(RunLockError, match="is in use by another run"):
        train_losses(run_values(corpus, tmp_path / "run"))


def test_other_checkpoints_are_not_written_over(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=4, eval_iters=0)
    train_losses(values)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints \(up to step 4\), and the configuration does not say to go on from them"):
        train_losses(values)


def test_a_missing_checkpoint_is_no_silent_start(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        train_losses(run_values(corpus, tmp_path / "run", load=str(tmp_path / "nowhere")))


def test_a_checkpoint_of_another_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", train_iters=4, eval_iters=0, resume_if_exists=True)
    train_losses(values)
    for key, value in (("intermediate_size", 32), ("activation", "silu"), ("moe_top_k", 1)):
        with pytest.raises(ConfigError, match=f"'{key}' = .* was trained with"):
            train_losses({**values, key: value})


def test_a_router_from_outside_the_package_trains(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.config.components import ROUTERS

    monkeypatch.setitem(ROUTERS, "outside_first", "unset")  # restored after the test
    (tmp_path / "my_router.py").write_text(
        "from megatron.config.components import ROUTERS\n"
        "from megatron.model.moe.routers.topk import TopKRouter\n\n\n"
        "class OutsideRouter(TopKRouter):\n"
        "    pass\n\n\n"
        'ROUTERS["outside_first"] = OutsideRouter\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    values = run_values(corpus, tmp_path / "run", plugins=["my_router"], moe_router_type="outside_first", eval_iters=0)
    assert len(train_losses(values)) == 8
