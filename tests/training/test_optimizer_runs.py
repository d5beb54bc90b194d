"""Whole runs with each optimizer: every ZeRO stage takes the same steps, skips what is not finite, and is resumed bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.config.section import ConfigError
from megatron.testing.tiny import TINY_DENSE
from tests.training.runs import losses_of, run_values, train_losses, train_with_bad_losses

PARAMS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3, "momentum": 0.9},
    "Lion": {"lr": 1e-3},
    "Adam8bit": {"lr": 1e-2, "betas": [0.9, 0.95]},
}


def values_of(corpus: Path, save: Path, kind: str, stage: int, **overrides: Any) -> dict[str, Any]:
    if kind == "Adam8bit":
        pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    values = {key: value for key, value in run_values(corpus, save).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    optimizer = {"optimizer": {"type": kind, "params": PARAMS[kind]}, "zero_optimization": {"stage": stage}}
    return {**values, **optimizer, "min_lr": 0.0, "eval_iters": 0, "train_iters": 7, "hidden_dropout": 0.1, **overrides}


@pytest.fixture(scope="module")
def stage_0(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of a run at stage 0 whose third step is not finite."""

    @cache
    def run(kind: str) -> list[float]:
        return train_with_bad_losses(values_of(corpus, tmp_path_factory.mktemp(kind), kind, 0), {2: math.nan})

    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["SGD", "Lion", "Adam8bit"])
def test_a_stage_skips_resumes_and_agrees(corpus: Path, tmp_path: Path, stage_0: Callable[[str], list[float]], kind: str, stage: int) -> None:
    """8-bit averages are blocks of what lies together in memory, which ZeRO changes, so that stages agree only roughly."""
    expected = stage_0(kind)
    straight = train_with_bad_losses(values_of(corpus, tmp_path / "straight", kind, stage), {2: math.nan}) if stage else expected
    assert straight[2] is None
    assert straight[:2] + straight[3:] == pytest.approx(expected[:2] + expected[3:], abs=0.05 if kind == "Adam8bit" else 1e-4)
    halves = values_of(corpus, tmp_path / "halves", kind, stage, resume_if_exists=True)
    assert train_with_bad_losses({**halves, "exit_interval": 4}, {2: math.nan}) == straight[:4]
    assert train_losses(halves) == straight
    assert losses_of(tmp_path / "halves/metrics.jsonl", "runtime/skipped_iterations")[-1] == 1


def test_another_optimizer_s_state_is_refused(corpus: Path, tmp_path: Path) -> None:
    values = values_of(corpus, tmp_path / "run", "SGD", 0, train_iters=2)
    train_losses(values)
    other = {
        **values,
        "load": values["save"],
        "save": None,
        "metrics_file": str(tmp_path / "m.jsonl"),
        "optimizer": {"type": "Lion", "params": {"lr": 1e-3}},
    }
    with pytest.raises(
        CheckpointError, match=r"was trained with the optimizer SGD\. This run uses Lion, which cannot read that state\. Set optimizer.type: SGD, or"
    ):
        train_losses(other)
    assert len(train_losses({**other, "no_load_optim": True, "train_iters": 4})) == 2


def test_another_schedule_is_refused_followed_or_kept(corpus: Path, tmp_path: Path) -> None:
    values = values_of(corpus, tmp_path / "run", "Lion", 0, lr_decay_style="linear", warmup=0.0, train_iters=4, lr_decay_iters=8)
    train_losses(values)
    other = {**values, "load": values["save"], "save": None, "metrics_file": str(tmp_path / "m.jsonl"), "train_iters": 6, "lr_decay_iters": 16}
    with pytest.raises(ConfigError) as raised:
        train_losses({**other, "optimizer": {"type": "Lion", "params": {"lr": 2e-3}}})
    assert raised.value.problems == [
        f"{tmp_path / 'run/global_step4'} was trained with another learning-rate schedule: optimizer.params.lr is 0.001 in the checkpoint and "
        "0.002 in the configuration; "
        "lr_decay_iters is 8 steps in the checkpoint and 16 steps in the configuration. Set override_lr_scheduler: true to follow this "
        "configuration from here on, or "
        "use_checkpoint_lr_scheduler: true to follow the checkpoint."
    ]

    def rates(**flag: bool) -> list[float]:
        Path(other["metrics_file"]).unlink(missing_ok=True)
        train_losses({**other, **flag})
        return losses_of(Path(other["metrics_file"]), "train/learning_rate")

    assert rates(use_checkpoint_lr_scheduler=True) == pytest.approx([1e-3 * 4 / 8, 1e-3 * 3 / 8])
    assert rates(override_lr_scheduler=True) == pytest.approx([1e-3 * 12 / 16, 1e-3 * 11 / 16])
    assert len(train_losses({**other, "finetune": True})) == 6, "weights alone bring no schedule"


def test_a_checkpoint_holds_gpt_neox_s_schedule(corpus: Path, tmp_path: Path) -> None:
    from megatron.checkpoint.reading import read_file

    train_with_bad_losses(values_of(corpus, tmp_path / "run", "Lion", 0, train_iters=3, lr_decay_iters=10, warmup=0.25), {1: math.nan})
    stored = read_file(tmp_path / "run/global_step3/mp_rank_00_model_states.pt", mmap=False)["lr_scheduler"]
    assert json.loads(json.dumps(stored)) == {
        "start_lr": 1e-3,
        "min_lr": 0.0,
        "warmup_iter": 2.5,
        "end_iter": 10,
        "decay_style": "cosine",
        "num_iters": 2,
    }
