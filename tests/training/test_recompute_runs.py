"""Whole runs that recompute: every ZeRO stage and two processes give the losses of a run that keeps everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.model import build_model
from megatron.model.recompute import Recomputed
from megatron.mpu.groups import ALONE, Group
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import tiny_config
from megatron.training.engine import enable_recomputation
from tests.training.runs import run_values, train_losses

LOSSES = {"load_balance": 0.01, "global_load_balance": 0.02, "joint_load_balance": 0.01, "z_loss": 0.001, "lore_balance": 0.01}
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "layers": {"checkpoint_activations": True},
    "layers by 2": {"checkpoint_activations": True, "checkpoint_num_layers": 2},
    "attention, experts": {"recompute_modules": ["attention", "experts"]},
    "moe": {"recompute_modules": ["moe"]},
}
MEASURED = ("train/", "load/", "moe/", "router")


def values_of(corpus: Path, metrics: Path, stage: int, **overrides: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    length = {"train_iters": 3, "eval_iters": 0, "gradient_accumulation_steps": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    return {**run_values(corpus, None), **length, "moe_losses": LOSSES, "zero_optimization": zero, "metrics_file": str(metrics), **overrides}


def records(metrics: Path) -> list[dict[str, float]]:
    """What does not depend on the time."""
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key.startswith(MEASURED) and "time" not in key} for record in found]


def train_all(runs: list[Mapping[str, Any]]) -> None:
    for values in runs:
        train_losses(values)


def check_same(folder: Path, names: Iterable[str]) -> None:
    expected = records(folder / "none.jsonl")
    assert {"train/lm_loss", "train/grad_norm", "train/global_load_balance"} <= {key for record in expected for key in record}
    for name in names:
        assert records(folder / f"{name}.jsonl") == expected, name


FEW = ("none", "layers by 2", "attention, experts")
slow = pytest.mark.slow


@pytest.mark.parametrize(("stage", "names"), [(0, FEW), (3, FEW), *(pytest.param(stage, tuple(WAYS), marks=slow) for stage in range(4))])
def test_recomputation_changes_no_metric_at_any_zero_stage(corpus: Path, tmp_path: Path, stage: int, names: tuple[str, ...]) -> None:
    """Losses, auxiliary losses, loads of experts and LoREs, and gradient norms are equal to the last digit. Nothing is counted twice."""
    for name in names:
        train_losses(values_of(corpus, tmp_path / f"{name}.jsonl", stage, **WAYS[name]))
    check_same(tmp_path, names)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputation_changes_no_metric_of_two_processes(corpus: Path, tmp_path: Path, stage: int) -> None:
    """The balance over the global batch is a sum over processes, which the backward pass takes again."""
    runs = [values_of(corpus, tmp_path / f"{name}.jsonl", stage, **keys) for name, keys in WAYS.items()]
    run_distributed(train_all, 2, runs, backend=None)
    check_same(tmp_path, WAYS)


@pytest.mark.parametrize(
    ("keys", "layers", "divided", "on_cpu"),
    [
        ({}, 0, False, False),
        ({"partition_activations": True, "checkpoint_in_cpu": True}, 0, False, False),
        ({"checkpoint_activations": True}, 1, False, False),
        ({"checkpoint_activations": True, "checkpoint_num_layers": 2, "checkpoint_in_cpu": True}, 2, False, True),
        ({"checkpoint_activations": True, "activation_checkpointing": {"cpu_checkpointing": True, "partition_activations": True}}, 1, True, True),
        ({"checkpoint_activations": True, "partition_activations": True}, 1, True, False),
    ],
)
def test_keys_reach_the_model(keys: dict[str, Any], layers: int, divided: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs go to the CPU's memory where the device is not the CPU itself."""
    config, group = tiny_config(**keys), Group((0, 1))
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("DS_ACCELERATOR", device)
        model = build_model(config.model, config.moe, 64, seed=1)
        enable_recomputation(config.training, model, equal=group)
        assert model.recompute_layers == layers
        assert model.kept_inputs.group is (group if divided else ALONE)
        assert model.kept_inputs.on_cpu == (on_cpu and device == "cuda")


def test_modules_reach_the_model() -> None:
    config = tiny_config(recompute_modules=["attention"])
    model = build_model(config.model, config.moe, 64, seed=1)
    enable_recomputation(config.training, model, equal=ALONE)
    assert [isinstance(layer.attention.forward, Recomputed) for layer in model.layers] == [True, True]
    assert not isinstance(model.layers[0].mlp.forward, Recomputed)
    assert model.recompute_layers == 0
