"""DeepSpeed's own profilers and monitors, switched on by NeoX's keys: each leaves what it promises in a run of two steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron.config.section import ConfigError
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE
from tests.training.runs import run_values, train_losses


def test_profilers_and_monitors_leave_what_they_promise(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monitors = {name: {"enabled": True, "output_path": str(tmp_path), "job_name": name} for name in ("csv_monitor", "tensorboard")}
    base = {key: value for key, value in run_values(corpus, None).items() if key in TINY_DENSE or not key.startswith("moe_")}
    values = {**base, "train_iters": 3, "eval_iters": 0, "metrics_file": str(tmp_path / "metrics.jsonl")}
    plain = train_losses(values)
    (tmp_path / "metrics.jsonl").unlink()
    asked = {
        **monitors,
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(tmp_path / "flops.txt")},
        "comms_logger": {"enabled": True},
        "dump_state": True,
        "deepspeed_extra_args": {"memory_breakdown": True},
    }
    assert train_losses({**values, **asked}) == plain, "watching changes nothing"
    assert "params per GPU" in (tmp_path / "flops.txt").read_text()
    assert (tmp_path / "csv_monitor" / "Train_Samples_lr.csv").read_text().startswith("step,lr")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    output = capfd.readouterr().out + caplog.text
    for promised in ("Comm. Op", "DeepSpeedEngine:", "Engine before forward"):
        assert promised in output, promised


def test_a_monitor_without_its_package_is_a_sentence(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(ConfigError) as caught:
        train_losses(run_values(corpus, tmp_path, wandb={"enabled": True}))
    assert caught.value.problems == ["wandb: {enabled: true} needs the package 'wandb': pip install wandb, or leave the key out"]


@pytest.mark.slow
def test_how_gradients_are_summed(corpus: Path, tmp_path: Path) -> None:
    """Two processes: dividing first changes the order of a division, summing in bf16 the sums."""
    base = {key: value for key, value in run_values(corpus, None).items() if key in TINY_DENSE or not key.startswith("moe_")}

    def losses(name: str, **keys: object) -> list[float]:
        zero = {"stage": 2, "reduce_scatter": False}
        values = {**base, "train_iters": 4, "eval_iters": 0, "zero_optimization": zero, "metrics_file": str(tmp_path / f"{name}.jsonl"), **keys}
        return run_distributed(train_losses, 2, values, backend=None)[0]

    plain = losses("plain")
    assert losses("prescaled", prescale_gradients=True) == pytest.approx(plain, abs=1e-5)
    assert losses("divided", gradient_predivide_factor=2.0) == pytest.approx(plain, abs=1e-5)
    rounded = losses("rounded", communication_data_type="bf16")
    assert rounded != plain
    assert rounded == pytest.approx(plain, abs=1e-2)
