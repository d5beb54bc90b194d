"""The optimizer and the weights in the CPU's memory: the same losses and norms, the same skipped steps, and checkpoints that go on either way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.optimizer import choose_optimizer
from megatron.training.process import start_process
from megatron.training.setup import build_trainer
from tests.training.runs import losses_of, run_values, train_losses, train_with_bad_losses

CPU = {"device": "cpu"}
OPTIMIZER = {"offload_optimizer": CPU}
BOTH = {"offload_optimizer": CPU, "offload_param": CPU}
ASKED = ("gradient_norms/", "optimizer_state_norms/", "parameter_norms/")


def values_of(corpus: Path, metrics: Path | None, stage: int, zero: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    settings = {"stage": stage, "stage3_param_persistence_threshold": 0, **zero} if stage == 3 else {"stage": stage, **zero}
    length = {"train_iters": 5, "eval_iters": 0, "gradient_accumulation_steps": 2, "zero_optimization": settings}
    place = {} if metrics is None else {"metrics_file": str(metrics)}
    return {**run_values(corpus, None), **length, **place, **overrides}


def train_all(runs: list[dict[str, Any]]) -> list[list[float]]:
    return [train_losses(values) for values in runs]


LAYOUTS: list[tuple[int, dict[str, Any]]] = [(1, OPTIMIZER), (2, {"cpu_offload": True}), (3, OPTIMIZER), (3, {"offload_param": CPU}), (3, BOTH)]
FEW: list[tuple[int, dict[str, Any]]] = [(2, OPTIMIZER), (3, BOTH)]


@pytest.mark.parametrize(
    ("precision", "layouts"),
    [("fp32", FEW), pytest.param("fp32", LAYOUTS, marks=pytest.mark.slow), pytest.param("bfloat16", LAYOUTS, marks=pytest.mark.slow)],
    ids=["fp32-few", "fp32-all", "bfloat16-all"],
)
def test_two_processes_take_the_same_steps_with_offloading(
    corpus: Path, tmp_path: Path, precision: str, layouts: list[tuple[int, dict[str, Any]]]
) -> None:
    """StructMoE, two micro-batches, gradients clipped: fp32 losses are equal; in bf16 only the rounding of the norm differs."""
    cases = [*((stage, {}) for stage in sorted({stage for stage, _ in layouts})), *layouts]
    runs = [values_of(corpus, tmp_path / f"{i}.jsonl", stage, zero, precision=precision) for i, (stage, zero) in enumerate(cases)]
    found = run_distributed(train_all, 2, runs, backend=None, timeout=300)[0]
    without = {stage: losses for (stage, zero), losses in zip(cases, found, strict=True) if not zero}
    for (stage, zero), losses in zip(cases, found, strict=True):
        assert losses == pytest.approx(without[stage], abs=1e-6 if precision == "fp32" else 1e-3), (stage, zero)
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("stage", "zero"), [(1, OPTIMIZER), (2, OPTIMIZER), (3, BOTH)])
def test_what_is_not_finite_is_skipped_and_runs_go_on_with_and_without(corpus: Path, tmp_path: Path, stage: int, zero: dict[str, Any]) -> None:
    """The third micro-batch is not finite, in the second step. A checkpoint made with offloading is loaded with it and without it."""
    dense = {key: value for key, value in values_of(corpus, None, stage, zero).items() if key in TINY_DENSE or not key.startswith(("moe_", "inter"))}
    dense |= {"hidden_dropout": 0.1, "train_iters": 6, "checkpoint_factor": 4}
    plain = {**dense, "zero_optimization": {"stage": stage}, "save": str(tmp_path / "plain")}
    expected = train_with_bad_losses(plain, {2: math.nan})
    straight = train_with_bad_losses({**dense, "save": str(tmp_path / "straight")}, {2: math.nan})
    assert [loss is None for loss in straight] == [False, True, False, False, False, False]
    assert [loss for loss in straight if loss] == pytest.approx([loss for loss in expected if loss], abs=1e-6)
    for name, settings in (("offloaded", dense), ("plain again", plain)):
        again = {**settings, "save": str(tmp_path / name), "load": str(tmp_path / "straight"), "iteration": 4}
        assert train_losses(again) == pytest.approx(straight[4:], abs=1e-6), name


@pytest.mark.parametrize(("stage", "zero"), [(2, OPTIMIZER), (3, BOTH)])
def test_offloading_changes_no_norm(corpus: Path, tmp_path: Path, stage: int, zero: dict[str, Any]) -> None:
    asked = {"log_grad_norm": True, "log_param_norm": True, "log_optimizer_states": True, "log_interval": 1, "train_iters": 3}
    plain, offloaded = (values_of(corpus, tmp_path / f"{len(settings)}.jsonl", stage, settings, **asked) for settings in ({}, zero))
    train_losses(plain)
    train_losses(offloaded)
    names = [key for key in _keys(Path(plain["metrics_file"])) if key.startswith(ASKED)]
    assert len(names) > 20
    for name in [*names, "train/grad_norm"]:
        expected = losses_of(Path(plain["metrics_file"]), name)
        assert losses_of(Path(offloaded["metrics_file"]), name) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def _keys(metrics: Path) -> list[str]:
    import json

    return sorted({key for line in metrics.read_text().splitlines() for key in json.loads(line)})


def test_deepspeed_offloads_what_was_asked_for(corpus: Path) -> None:
    """PyTorch's fused Adam updates the parts on the CPU. Without the settings DeepSpeed offloads nothing."""
    config = tiny_config(values_of(corpus, None, 3, BOTH, precision="bfloat16"))
    engine = build_trainer(config, start_process(backend="gloo", threads=None)).engine
    assert engine.zero_cpu_offload()
    assert engine.optimizer.offload_optimizer
    assert engine.optimizer.offload_param
    assert type(engine.optimizer.optimizer) is torch.optim.Adam
    assert engine.optimizer.optimizer.defaults["fused"] is True
    assert {part.device.type for part in engine.optimizer.fp32_partitioned_groups_flat} == {"cpu"}
    plain = build_trainer(tiny_config(values_of(corpus, None, 3, {}, precision="bfloat16")), start_process(backend="gloo", threads=None)).engine
    assert not plain.optimizer.offload_optimizer
    assert not plain.optimizer.offload_param


def test_an_offloaded_optimizer_needs_no_package_on_a_gpu() -> None:
    config = OptimizerConfig(zero_optimization={"stage": 1, **OPTIMIZER})
    assert choose_optimizer(config, "cuda")[0] is torch.optim.Adam
