"""Optional destinations, asked for in the configuration."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from megatron.config.logging import LoggingConfig
from megatron.monitor.sink import SinkUnavailable
from megatron.monitor.sinks import check_sinks
from tests.training.runs import losses_of, run_values, train_losses


@pytest.mark.parametrize(
    ("logging", "sentence", "file"),
    [
        (LoggingConfig(use_wandb=True), "use_wandb: true needs the package 'wandb': pip install wandb, or leave the key out", "wandb"),
        (LoggingConfig(use_comet=True), "use_comet: true needs the package 'comet_ml': pip install comet_ml, or leave the key out", "comet"),
        (
            LoggingConfig(tensorboard_dir="tb"),
            "tensorboard_dir needs the package 'tensorboard': pip install tensorboard, or leave the key",
            "tensorboard",
        ),
    ],
)
def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, logging: LoggingConfig, sentence: str, file: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SinkUnavailable) as raised:
        check_sinks(logging)
    assert str(raised.value).startswith(sentence)
    assert str(raised.value).endswith(f"(the version: requirements/requirements-{file}.txt)")


def test_a_run_with_every_sink(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    wandb.teardown()  # it remembers the folder of an earlier run in this process
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wanted = {"use_wandb": True, "wandb_group": "foxes", "tensorboard_dir": "tb", "log_dir": "logs", "progress": "rich", "log_grad_norm": True}
    train_losses(run_values(corpus, tmp_path / "run", train_iters=4, eval_iters=1, **wanted))
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert list(tmp_path.glob("tb/events*"))
    (log,) = tmp_path.glob("logs/*_rank_00_stdout.txt")
    assert re.search(r"^ samples/sec: .* \| number of nan iterations:   0 \|$", log.read_text(), re.MULTILINE)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    expected = {"train/lm_loss", "train/learning_rate", "train/grad_norm", "train/tokens", "runtime/samples_per_sec", "timers/forward"}
    assert expected | {"validation/lm_loss_ppl", "test/lm_loss", "gradient_norms/sequential.5.norm.weight"} <= set(events.Tags()["scalars"])


def test_an_account_alone_switches_nothing_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "COMET_API_KEY"):
        monkeypatch.setenv(name, "0" * 40)
    monkeypatch.chdir(tmp_path)
    train_losses(run_values(corpus, tmp_path / "run", train_iters=1, eval_iters=0))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_the_last_steps_are_logged_when_the_interval_is_longer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_losses(run_values(corpus, tmp_path / "run", train_iters=3, eval_iters=0, log_interval=100))
    assert "| iteration        3/       3 |" in capsys.readouterr().out
    assert len(losses_of(tmp_path / "run/metrics.jsonl", "moe/expert_load")) == 1
