"""Real runs of a tiny model, with faults put into its weights: each raises its own alert within one log interval, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.analysis.dashboard.content import ALERT_HEADING, sections
from megatron.analysis.dashboard.run import Run
from megatron.analysis.page import DataTable
from megatron.training.callbacks import build
from megatron.training.callbacks.base import Callback
from megatron.training.health import TrainingDiverged
from megatron.training.step import StepMetrics
from megatron.training.trainer import Trainer
from tests.training.runs import run_values, train_losses

FAULT_AFTER = 23
LOG_INTERVAL = 5
Fault = Callable[[Any], None]


class FaultCallback(Callback):
    """Changes the weights once, after the step FAULT_AFTER."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.state.iteration == FAULT_AFTER:
            with torch.no_grad():
                self.fault(trainer.engine.module)


def weights(model: Any, end: str) -> list[torch.nn.Parameter]:
    """The parameters whose names end so, first layer first."""
    return [weight for name, weight in model.named_parameters() if name.endswith(end)]


def spoil_predictions(model: Any) -> None:
    """The last norm's weights grow, so wrong predictions become certain."""
    weights(model, ".norm.weight")[0].mul_(30)


def put_nan(model: Any) -> None:
    weights(model, ".final_linear.weight")[0][0, 0] = torch.nan


def make_certain(model: Any) -> None:
    """The first router's probabilities become 0 and 1."""
    weights(model, ".router.layer.weight")[0].mul_(1e4)


def starve_expert(model: Any) -> None:
    """A direction is added to the second router's input. Its row for expert 3 dislikes the direction, and the other rows do not see it."""
    direction = torch.full((32,), 32**-0.5)
    weights(model, ".post_attention_layernorm.bias")[1].add_(4 * direction)
    rows = weights(model, ".router.layer.weight")[1]
    rows.sub_((rows @ direction)[:, None] * direction)
    rows[3] = -5 * direction


def send_all_to_one(model: Any) -> None:
    """The same, but only expert 0 likes the direction."""
    starve_expert(model)
    weights(model, ".router.layer.weight")[1][3] = 0
    weights(model, ".router.layer.weight")[1][0] = 2 * torch.full((32,), 32**-0.5)


def alerts_of(metrics: Path) -> list[dict[str, Any]]:
    records = map(json.loads, metrics.read_text().splitlines())
    return [record["alert"] for record in records if "alert" in record]


def train_with(fault: Fault | None, corpus: Path, save: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[dict[str, Any]]:
    """Trains 40 steps of a tiny model and returns its alerts."""
    original = build.optional_callbacks
    added = [] if fault is None else [FaultCallback(fault)]
    monkeypatch.setattr(build, "optional_callbacks", lambda *given: [*original(*given), *added])
    values = {
        "train_iters": 40,
        "eval_iters": 0,
        "steps_per_print": 0,
        "checkpoint_factor": 100,
        "log_interval": LOG_INTERVAL,
        "train_micro_batch_size_per_gpu": 8,
        "max_nonfinite_steps": 100,
    }
    with pytest.raises(TrainingDiverged) if fault is put_nan else contextlib.nullcontext():
        train_losses(run_values(corpus, save, **{**values, **keys}))
    return alerts_of(save / "metrics.jsonl")


FAULTS = [
    (spoil_predictions, "loss_spike", None),
    (put_nan, "nan_streak", None),
    (make_certain, "router_collapse", 0),
    (starve_expert, "dead_experts", 1),
    (send_all_to_one, "router_collapse", 1),
]


def test_a_good_run_raises_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_with(None, corpus, tmp_path / "run", monkeypatch) == []


@pytest.mark.parametrize("case", FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_fault_raises_its_own_alert_within_one_log_interval(
    case: tuple[Fault, str, int | None], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, kind, layer = case
    keys = {"moe_top_k": 1} if fault is send_all_to_one else {}
    found = train_with(fault, corpus, tmp_path / "run", monkeypatch, **keys)
    assert {(alert["kind"], alert["layer"]) for alert in found} == {(kind, layer)}
    assert FAULT_AFTER < found[0]["step"] <= FAULT_AFTER + LOG_INTERVAL
    repeats = kind in ("nan_streak", "loss_spike")  # a streak has doubled; spoiled predictions come back in jumps
    assert repeats or len(found) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALERT")]
    assert len(lines) == len(found)
    assert lines[0].startswith(f"ALERT at step {found[0]['step']}: ")
    assert found[0]["seen"] in lines[0]
    assert found[0]["try"] in lines[0]
    run = Run(tmp_path / "run", "run")
    run.refresh()
    shown = next(part for part in sections([run])[0].parts if isinstance(part, DataTable) and ALERT_HEADING in part.columns)
    assert [row[3] for row in reversed(shown.rows)] == [f"{alert['seen']}\n{alert['try']}" for alert in found], (
        "the live page lists them, the newest first"
    )


def test_a_run_that_goes_on_compares_its_losses_with_those_before(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are spoiled after the checkpoint was loaded, so the first step of the second launch has the spike."""
    keys = {"checkpoint_factor": 24, "resume_if_exists": True, "override_lr_scheduler": True}
    assert train_with(None, corpus, tmp_path / "run", monkeypatch, **keys, train_iters=24) == []
    monkeypatch.setattr(FaultCallback, "before_training", torch.no_grad()(lambda self, trainer: self.fault(trainer.engine.module)))
    found = train_with(spoil_predictions, corpus, tmp_path / "run", monkeypatch, **keys, train_iters=27)
    assert [(alert["kind"], alert["step"]) for alert in found] == [("loss_spike", 25)]


def test_alerts_can_be_switched_off(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_with(put_nan, corpus, tmp_path / "run", monkeypatch, alerts=False) == []
