"""A larger `train_iters` when a run goes on: fine where it leaves the rates of the past alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron.config.optimizer import OptimizerConfig
from megatron.config.section import ConfigError
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.schedule import schedule_of
from megatron.training.schedule_record import ScheduleRecord, schedule_to_follow
from tests.training.runs import losses_of, run_values, train_losses

INFINITE = {"lr_decay_style": "infinite_cosine", "constant_lr": 5e-3, "cooldown_iters_perc": 0.1, "constant_iters_perc": 0.6}


def followed(keys: dict[str, Any], *, at: int, before: int = 1000, after: int = 3000, **changed: Any) -> Any:
    """What a run of `after` steps follows that goes on at step `at` from one of `before`."""
    there, own = (schedule_of(tiny_config({**TINY_DENSE, **keys, **more})) for more in ({"train_iters": before}, {"train_iters": after, **changed}))
    saved, record = ScheduleRecord(there), ScheduleRecord(own)
    record.load_state_dict(saved.state_dict())
    record.steps_done = at
    return own, schedule_to_follow(record, OptimizerConfig(), Path("run/global_step1000"))


@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({"lr_decay_style": "constant", "warmup": 0.05}, 1000),
        ({"lr_decay_style": "constant", "warmup": 0.05}, 200),
        ({"lr_decay_style": "wsd", "warmup": 0.05, "wsd_decay_ratio": 0.2}, 790),
        ({**INFINITE, "warmup": 0.01}, 600),
        ({"lr_decay_style": "cosine", "lr_decay_iters": 5000}, 1000),
        ({"lr_decay_style": "wsd", "lr_decay_iters": 1000}, 1000),
    ],
)
def test_a_longer_run_goes_on_where_the_rate_is_the_same(keys: dict[str, Any], at: int) -> None:
    own, schedule = followed(keys, at=at)
    assert schedule == own


@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({"lr_decay_style": "cosine", "warmup": 0.0}, 1000),
        ({"lr_decay_style": "linear", "warmup": 0.0}, 500),
        ({"lr_decay_style": "constant", "warmup": 0.05}, 20),
        ({"lr_decay_style": "wsd", "warmup": 0.05, "wsd_decay_ratio": 0.2}, 900),
        ({**INFINITE, "warmup": 0.01}, 50),
    ],
)
def test_a_schedule_whose_past_would_change_says_what_to_set(keys: dict[str, Any], at: int) -> None:
    with pytest.raises(ConfigError) as raised:
        followed(keys, at=at)
    (problem,) = raised.value.problems
    assert "lr_decay_iters is 1000 steps in the checkpoint and 3000 steps in the configuration" in problem
    assert (
        "Only the length differs, which follows train_iters. With the new length, the steps so far would have had other learning rates. " in problem
    )
    assert "Set lr_decay_iters: 1000 to keep the schedule as it was" in problem
    assert ("the rate then rises again" in problem) == (keys["lr_decay_style"] == "cosine")
    assert "Set override_lr_scheduler: true to follow this configuration" in problem


def test_what_it_says_to_set_works() -> None:
    own, schedule = followed({"lr_decay_style": "cosine", "warmup": 0.1}, at=1000, lr_decay_iters=1000)
    assert schedule == own


@pytest.mark.parametrize("changed", [{"warmup": 0.2}, {"min_lr": 1e-4}])
def test_another_schedule_is_still_refused(changed: dict[str, Any]) -> None:
    """A constant rate at which both stand, but keys of the schedule itself were changed."""
    with pytest.raises(ConfigError, match="was trained with another learning-rate schedule") as raised:
        followed({"lr_decay_style": "constant", "warmup": 0.05}, at=1000, **changed)
    assert "Only the length differs" not in str(raised.value)


def test_a_finished_run_is_made_longer(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    values = {
        key: value for key, value in run_values(corpus, tmp_path / "run").items() if key in TINY_DENSE or not key.startswith(("moe_", "interm"))
    }
    values |= {"lr_decay_style": "constant", "warmup": 0.25, "resume_if_exists": True, "eval_iters": 0}
    train_losses({**values, "train_iters": 4})
    assert len(train_losses({**values, "train_iters": 6})) == 6
    assert losses_of(tmp_path / "run" / "metrics.jsonl", "train/learning_rate")[2:] == [1e-2] * 4
    said = capsys.readouterr().out
    assert "belongs to a training of 4 steps; this run has 6." in said
    assert "The learning-rate schedule now has 6 steps; before it had 4. Both give the same learning rate up to here." in said


def test_fields_are_known() -> None:
    from megatron.training.schedule import Schedule
    from megatron.training.schedule_record import LENGTHS

    names = {field.name for field in dataclasses.fields(Schedule)}
    assert set(LENGTHS) == {name for name in names if name.endswith("_steps")} - {"decay_steps"}
