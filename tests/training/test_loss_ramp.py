"""`moe_loss_ramp`: the coefficient of a loss rises as its definition says, in every layout, and a resumed run goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.moe import MoEConfig
from megatron.testing.distributed import run_distributed
from megatron.training.callbacks.loss_ramp import coefficients
from tests.training.runs import run_values, train_losses

BLES, BALANCE = "block_wise_selection", "load_balance"
STEPS = 6
ADAM = {"type": "Adam", "params": {"lr": 1e-2}}


@pytest.mark.parametrize(
    ("ramp", "done", "expected"),
    [
        ([0.25, 0.75], 0.0, 0.0),
        ([0.25, 0.75], 0.25, 0.0),
        ([0.25, 0.75], 0.5, 2.0),
        ([0.25, 0.75], 0.75, 4.0),
        ([0.25, 0.75], 1.0, 4.0),
        ([0.5, 0.5], 0.49, 0.0),
        ([0.5, 0.5], 0.5, 4.0),
        ([0.0, 0.0], 0.0, 4.0),
        ([0.0, 1.0], 0.25, 1.0),
    ],
)
def test_a_coefficient_rises_evenly_between_two_parts_of_the_run(ramp: list[float], done: float, expected: float) -> None:
    moe = MoEConfig(moe_num_experts=4, moe_losses={BALANCE: 0.5, BLES: 4.0}, moe_loss_ramp={BLES: ramp})
    assert coefficients(moe, done) == [0.5, expected]


def values(corpus: Path, metrics: Path, **changes: Any) -> dict[str, Any]:
    keys = {"train_iters": STEPS, "eval_iters": 0, "optimizer": ADAM, "warmup": 0.0, "moe_losses": {BALANCE: 0.1, BLES: 20.0}}
    return {**run_values(corpus, None), **keys, "metrics_file": str(metrics), **changes}


def test_steps_before_the_ramp_are_those_without_the_loss(corpus: Path, tmp_path: Path) -> None:
    """The loss of step n shows the weights after n - 1 steps. Three of six steps come before the ramp."""
    ramped = train_losses(values(corpus, tmp_path / "ramped.jsonl", moe_loss_ramp={BLES: [0.5, 0.5]}))
    without = train_losses(values(corpus, tmp_path / "without.jsonl", moe_losses={BALANCE: 0.1}))
    always = train_losses(values(corpus, tmp_path / "always.jsonl"))
    assert ramped[:4] == pytest.approx(without[:4], rel=1e-6)
    assert all(abs(ramped[step] - without[step]) > 1e-4 for step in (4, 5))
    assert abs(ramped[1] - always[1]) > 1e-4


def test_a_resumed_run_goes_on_with_the_ramp(corpus: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"moe_loss_ramp": {BLES: [0.0, 1.0]}}
    straight = train_losses(values(corpus, tmp_path / "straight.jsonl", **keys))
    halves: dict[str, Any] = {**keys, "save": str(tmp_path / "run"), "checkpoint_factor": 3, "resume_if_exists": True}
    train_losses(values(corpus, tmp_path / "halves.jsonl", **halves, exit_interval=3))
    assert train_losses(values(corpus, tmp_path / "halves.jsonl", **halves)) == pytest.approx(straight, rel=1e-6)


def test_the_stages_of_a_pipeline_ramp_together(corpus: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"moe_loss_ramp": {BLES: [0.0, 1.0]}, "num_layers": 4, "zero_optimization": {"stage": 0}}
    one = train_losses(values(corpus, tmp_path / "one.jsonl", **keys))
    two = run_distributed(train_losses, 2, values(corpus, tmp_path / "two.jsonl", **keys, pipe_parallel_size=2), backend=None)[0]
    assert two == pytest.approx(one, rel=1e-5)
