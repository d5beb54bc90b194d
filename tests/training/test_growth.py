"""SMoE-Dropout's number of experts per token is a function of the step: in training, after a resume, in evaluation and in what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import config_from_dict
from megatron.inference.model import load_ready_model
from megatron.model.moe.layer import MoELayer
from megatron.testing.distributed import run_distributed
from tests.training.runs import run_values, train_losses

STEPS = 6
GROWS = [1, 2, 2, 3, 3, 4]
"""1 + round(3 * n / 6) for the steps n = 0 to 5, halves rounded up; and 4 after the last."""


def values(corpus: Path, metrics: Path, **changes: Any) -> dict[str, Any]:
    router = {"moe_router_type": "smoe_dropout", "moe_num_experts": 4, "moe_top_k": 4, "moe_losses": {}}
    keys = {"train_iters": STEPS, "eval_iters": 0, "optimizer": {"type": "Adam", "params": {"lr": 1e-2}}, "warmup": 0.0}
    return {**run_values(corpus, None), **router, **keys, "metrics_file": str(metrics), **changes}


def experts_per_token(metrics: Path) -> list[float]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [round(record["moe/experts_per_token"], 6) for record in records if "moe/experts_per_token" in record]


def test_k_of_every_step_also_after_a_resume(corpus: Path, tmp_path: Path) -> None:
    straight = train_losses(values(corpus, tmp_path / "straight.jsonl"))
    assert experts_per_token(tmp_path / "straight.jsonl") == GROWS
    halves: dict[str, Any] = {"save": str(tmp_path / "run"), "checkpoint_factor": 3, "resume_if_exists": True}
    train_losses(values(corpus, tmp_path / "halves.jsonl", **halves, exit_interval=3))
    assert train_losses(values(corpus, tmp_path / "halves.jsonl", **halves)) == straight
    assert experts_per_token(tmp_path / "halves.jsonl") == GROWS


@pytest.mark.parametrize(("step", "keys", "expected"), [(3, {}, 3), (6, {}, 4), (6, {"moe_router_eval_k": 2}, 2)])
def test_a_saved_model_uses_the_k_that_it_had_reached(step: int, keys: dict[str, Any], expected: int, corpus: Path, tmp_path: Path) -> None:
    run = values(corpus, tmp_path / "metrics.jsonl", save=str(tmp_path / "run"), checkpoint_factor=3)
    train_losses(run)
    settings = {key: value for key, value in run.items() if value is not None}
    ready = load_ready_model(config_from_dict({**settings, **keys, "load": str(tmp_path / "run"), "iteration": step}))
    routers: list[Any] = [layer.mlp.router for layer in ready.gpt.layers if isinstance(layer.mlp, MoELayer)]
    assert [int(router.chosen) for router in routers] == [expected] * 2


@pytest.mark.parametrize("layout", [{"pipe_parallel_size": 2}, {"zero_optimization": {"stage": 1}}], ids=str)
def test_k_grows_on_every_process(layout: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    run_distributed(train_losses, 2, values(corpus, tmp_path / "metrics.jsonl", **layout), backend=None)
    assert experts_per_token(tmp_path / "metrics.jsonl") == GROWS
