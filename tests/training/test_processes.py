"""Two gloo processes do what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE
from tests.training.runs import run_values, train_losses, train_with_one_bad_process

STEPS = 50


def dense_values(corpus: Path, metrics: Path, **overrides: Any) -> dict[str, Any]:
    """A dense model with a learning rate at which rounding differences stay rounding differences."""
    values = {key: value for key, value in run_values(corpus, None).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    optimizer = {"type": "Adam", "params": {"lr": 1e-3}}
    return {**values, "train_iters": STEPS, "eval_iters": 0, "optimizer": optimizer, "train_batch_size": 4, "metrics_file": str(metrics), **overrides}


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_give_the_losses_of_one(corpus: Path, tmp_path: Path, stage: int) -> None:
    one = train_losses(dense_values(corpus, tmp_path / "one.jsonl", train_micro_batch_size_per_gpu=4))
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    first, second = run_distributed(train_losses, 2, dense_values(corpus, tmp_path / "two.jsonl", **settings), backend=None)
    assert len(one) == STEPS
    assert first == pytest.approx(one, abs=1e-5)
    assert second == first, "both read the file that the first one wrote"


def test_two_structmoe_processes_give_the_losses_of_one_that_accumulates(corpus: Path, tmp_path: Path) -> None:
    """The same micro-batches, so that even the balance loss, which looks at one micro-batch at a time, is the same."""
    values = run_values(corpus, None, train_iters=20, eval_iters=0, optimizer={"type": "Adam", "params": {"lr": 1e-3}}, train_batch_size=4)
    one = train_losses({**values, "metrics_file": str(tmp_path / "one.jsonl")})
    settings = {"zero_optimization": {"stage": 1}, "metrics_file": str(tmp_path / "two.jsonl")}
    assert run_distributed(train_losses, 2, {**values, **settings}, backend=None)[0] == pytest.approx(one, abs=1e-4)


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_both(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, None, train_iters=6, eval_iters=0, train_batch_size=4, metrics_file=str(tmp_path / "m.jsonl"))
    for losses in run_distributed(train_with_one_bad_process, 2, values, backend=None):
        assert losses[2] is None
        assert all(loss is not None and loss < 20 for number, loss in enumerate(losses) if number != 2)


def test_a_resumed_pair_is_bit_for_bit_the_same(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "a", zero_optimization={"stage": 1}, hidden_dropout=0.1, train_batch_size=4)
    expected = run_distributed(train_losses, 2, values, backend=None)[0]
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    assert run_distributed(train_losses, 2, {**halves, "exit_interval": 5}, backend=None)[0] == expected[:5]
    assert run_distributed(train_losses, 2, halves, backend=None)[0] == expected
