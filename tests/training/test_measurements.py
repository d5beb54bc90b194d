"""What is recorded when it is asked for: norms of every parameter, the noise scale, profiles, the short progress line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.testing.devices import DEVICES
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE
from megatron.training.phases import Phases
from tests.training.runs import run_values, train_losses, train_with_bad_losses

ASKED = {
    "log_grad_norm": True,
    "log_param_norm": True,
    "log_grad_pct_zeros": True,
    "log_optimizer_states": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 2,
}
GROUPS = ("gradient_norms/", "parameter_norms/", "pct_grad_zeros/", "optimizer_state_norms/", "train/noise_scale")


def values_of(corpus: Path, metrics: Path, stage: int, **overrides: Any) -> dict[str, Any]:
    values = {key: value for key, value in run_values(corpus, None).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    length = {"eval_iters": 0, "train_iters": 4, "lr_decay_iters": 8, "train_batch_size": 4}
    return {**values, **length, "metrics_file": str(metrics), "zero_optimization": zero, **overrides}


def records(metrics: Path) -> list[dict[str, float]]:
    """One for each step, everything that was written for it together."""
    found: dict[int, dict[str, float]] = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["iteration"], {}).update(record)
    return list(found.values())


def measured(metrics: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in record.items() if key.startswith(GROUPS)} for record in records(metrics)]


@pytest.fixture(scope="module")
def stage_0(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metrics = tmp_path_factory.mktemp("stage_0") / "metrics.jsonl"
    train_losses(values_of(corpus, metrics, 0, **ASKED))
    return metrics


def test_norms_are_those_of_gpt_neox_s_names(stage_0: Path) -> None:
    first, second, *_ = records(stage_0)
    names = [key.removeprefix("gradient_norms/") for key in first if key.startswith("gradient_norms/")]
    assert "sequential.0.word_embeddings.weight" in names
    assert [key.removeprefix("parameter_norms/") for key in first if key.startswith("parameter_norms/")] == names
    together = math.sqrt(sum(first[f"gradient_norms/{name}"] ** 2 for name in names))
    assert together == pytest.approx(first["train/grad_norm"], rel=1e-5)
    assert {key for key in first if key.startswith("optimizer")} == {
        f"optimizer_state_norms/{g}_{a}" for g in (0, 1) for a in ("exp_avg", "exp_avg_sq")
    }
    shares = {name: first[f"pct_grad_zeros/{name}"] for name in names}
    assert 10 < shares["sequential.0.word_embeddings.weight"] < 100, "most characters do not occur in a batch"
    assert shares["sequential.2.attention.dense.weight"] == 0
    assert [record["iteration"] for record in records(stage_0) if "train/noise_scale" in record] == [2, 4]
    decayed = {name for name in names if not name.endswith("bias") and "norm" not in name}
    clipped = 0.1 * math.sqrt(sum(first[f"gradient_norms/{name}"] ** 2 for name in decayed)) / max(1.0, first["train/grad_norm"])
    assert first["optimizer_state_norms/0_exp_avg"] == pytest.approx(clipped, rel=1e-4), "(1 - beta1) times the first gradient after clipping"
    assert second["optimizer_state_norms/0_exp_avg"] != first["optimizer_state_norms/0_exp_avg"]


def check_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-2 if key == "train/noise_scale" else 1e-3, abs=1e-5), key


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_changes_no_norm(corpus: Path, tmp_path: Path, stage_0: Path, stage: int) -> None:
    train_losses(values_of(corpus, tmp_path / "metrics.jsonl", stage, **ASKED, gradient_noise_scale_cpu_offload=True))
    check_same(measured(tmp_path / "metrics.jsonl"), measured(stage_0))


def train_all(runs: list[Mapping[str, Any]]) -> None:
    for values in runs:
        train_losses(values)


def test_two_processes_change_no_norm(corpus: Path, tmp_path: Path, stage_0: Path) -> None:
    runs = [values_of(corpus, tmp_path / f"{stage}.jsonl", stage, **ASKED, train_iters=2) for stage in (2, 3)]
    run_distributed(train_all, 2, runs, backend=None)
    for stage in (2, 3):
        check_same(measured(tmp_path / f"{stage}.jsonl"), measured(stage_0)[:2])


def test_nothing_is_measured_unasked_and_measuring_changes_nothing(corpus: Path, tmp_path: Path, stage_0: Path) -> None:
    losses = train_losses(values_of(corpus, tmp_path / "metrics.jsonl", 0))
    assert measured(tmp_path / "metrics.jsonl") == [{}] * 4
    assert [record["train/lm_loss"] for record in records(stage_0)] == losses


def test_a_skipped_step_in_bf16_is_measured_as_well(corpus: Path, tmp_path: Path) -> None:
    train_with_bad_losses(values_of(corpus, tmp_path / "metrics.jsonl", 1, **ASKED, precision="bfloat16"), {2: math.nan})
    found = measured(tmp_path / "metrics.jsonl")
    broken = [[key for key, value in record.items() if value is None] for record in found]
    assert [{key.split("/")[0] for key in keys} for keys in broken] == [set(), {"gradient_norms"}, set(), set()]
    assert ["train/noise_scale" in record for record in found] == [False, False, True, False], "measured on two batches that were finite"


@pytest.mark.parametrize(("length", "directory"), [(4, "tensorboard_dir"), (2, "log_dir")])
def test_profiles(corpus: Path, tmp_path: Path, length: int, directory: str) -> None:
    """Also of a run that ends before the profile does."""
    keys = {"profile": True, "memory_profiling": True, "profile_step_start": 1, "profile_step_stop": 3, directory: str(tmp_path / "traces")}
    train_losses(values_of(corpus, tmp_path / "metrics.jsonl", 0, train_iters=length, **keys))
    (trace,) = tmp_path.glob("traces/*_rank_00_steps_2_to_3.pt.trace.json")
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::embedding") == 2 * (min(length, 3) - 1), "two micro-batches for each profiled step"
    (table,) = tmp_path.glob("traces/*_rank_00_steps_2_to_3.memory.txt")
    assert "aten::embedding" in table.read_text()


def test_lines_of_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"log_interval": 2, "steps_per_print": 3, "peak_theoretical_tflops": 0.5, "checkpoint_activations": True}
    train_losses(values_of(corpus, tmp_path / "metrics.jsonl", 0, **keys))
    lines = capsys.readouterr().out.splitlines()
    train = [line for line in lines if line.startswith(" samples/sec: ")]
    assert [re.search(r"iteration +(\d+)/ +4 \|", line)[1] for line in train] == ["2", "4"]  # type: ignore[index]
    mfu, hfu = (float(found) for found in re.search(r"MFU: ([\d.]+)% \| HFU: ([\d.]+)%", train[1]).groups())  # type: ignore[union-attr]
    assert hfu == pytest.approx(mfu * 4 / 3, abs=0.02), "the forward pass is computed twice"
    assert [line.split(" loss:")[0] for line in lines if line.startswith("steps: ")] == ["steps: 3"]
    memory = [line for line in lines if "memory (MB)" in line]
    assert [line.split(" | ")[0] for line in memory] == ["after 2 iterations memory (MB)"], "once"
    times = [line for line in lines if line.startswith("time (ms)")]
    assert [re.sub(r"[\d.]+", "x", line) for line in times] == ["time (ms) | forward: x | backward: x | optimizer: x | batch generator: x"] * 2
    last = records(tmp_path / "metrics.jsonl")[-1]
    assert last["train/tokens"] == 4 * 4 * 16
    assert last["runtime/hardware_flops_utilization"] == pytest.approx(last["runtime/model_flops_utilization"] * 4 / 3)
    assert 0 < last["timers/forward"] + last["timers/backward"] + last["timers/optimizer"] <= last["runtime/iteration_time"]


@pytest.mark.parametrize("device", DEVICES)
def test_phases_add_up_and_nest(device: str) -> None:
    phases, matrix = Phases(torch.device(device)), torch.ones(300, 300, device=device)
    for _ in range(3):
        with phases("outer"):
            with phases("inner"):
                matrix = matrix @ matrix / 300
            matrix = matrix @ matrix / 300
    assert matrix.sum().item() == pytest.approx(300 * 300), "the device is done"
    seconds = phases.seconds()
    assert 0 < seconds["inner"] < seconds["outer"]
