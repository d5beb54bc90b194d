"""`eval_tasks` in a training run, on one process and on several: the same numbers, and the training that follows is not disturbed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import LoadedConfig
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import tiny_config
from tests.training.runs import losses_of, run_values

pytestmark = pytest.mark.timeout(600)
"""The harness imports much, which takes minutes on a busy machine."""
TASKS = ["arc_easy", "wikitext", "boolq-seq2seq"]


def train_with_tasks(values: Mapping[str, Any]) -> list[float]:
    """Trains in this process with the callback, and returns the losses."""
    from megatron.inference.harness.training import task_callbacks
    from megatron.training.run import train

    config = tiny_config(values)
    train(LoadedConfig(config), task_callbacks)
    return losses_of(Path(str(config.logging.metrics_file)))


def values_of(corpus: Path, task_data: Path, metrics: Path, **keys: Any) -> dict[str, Any]:
    optimizer = {"type": "Adam", "params": {"lr": 1e-3}}
    sizes = {"seq_length": 32, "max_position_embeddings": 32, "train_iters": 2, "train_batch_size": 4, "eval_iters": 0}
    measured = {"eval_tasks": TASKS, "eval_tasks_interval": 1, "eval_limit": 3, "eval_data": str(task_data)}
    plot = {"plot_file": str(metrics.with_suffix(".png"))}
    return run_values(corpus, None, **{"optimizer": optimizer, "metrics_file": str(metrics), **sizes, **measured, **plot, **keys})


def tasks_in(metrics: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {(record["iteration"], key): value for record in records for key, value in record.items() if key.startswith("eval/")}


@pytest.fixture(scope="module")
def alone(corpus: Path, task_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[tuple[int, str], float]]:
    """Losses and tasks of one process."""
    metrics = tmp_path_factory.mktemp("alone") / "one.jsonl"
    return train_with_tasks(values_of(corpus, task_data, metrics)), tasks_in(metrics)


def test_tasks_are_measured_at_every_interval_and_at_the_end(alone: tuple[list[float], dict[tuple[int, str], float]]) -> None:
    found = alone[1]
    assert {step for step, _ in found} == {1, 2}
    for key in ("eval/arc_easy_acc", "eval/arc_easy_acc_norm", "eval/wikitext_bits_per_byte", "eval/boolq-seq2seq_exact_match"):
        assert (2, key) in found
    assert found[1, "eval/wikitext_bits_per_byte"] != found[2, "eval/wikitext_bits_per_byte"]


def test_training_goes_on_as_without_tasks(
    corpus: Path, task_data: Path, tmp_path: Path, alone: tuple[list[float], dict[tuple[int, str], float]]
) -> None:
    from megatron.training.run import train

    values = values_of(corpus, task_data, tmp_path / "plain.jsonl", eval_tasks_interval=None)
    train(LoadedConfig(tiny_config(values)))
    assert losses_of(tmp_path / "plain.jsonl") == alone[0]


LAYOUTS = {
    "EP2": {"moe_expert_parallel_size": 2},
    "TP2, sequence parallel": {"model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipe_parallel_size": 2},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [pytest.param(keys, id=name) for name, keys in LAYOUTS.items()])
def test_several_processes_find_what_one_finds(
    corpus: Path, task_data: Path, tmp_path: Path, alone: tuple[list[float], dict[tuple[int, str], float]], keys: dict[str, Any]
) -> None:
    metrics = tmp_path / "several.jsonl"
    losses = run_distributed(train_with_tasks, 2, values_of(corpus, task_data, metrics, **keys), backend=None, timeout=500)[0]
    assert losses == pytest.approx(alone[0], rel=1e-4)
    found = tasks_in(metrics)
    assert found.keys() == alone[1].keys()
    for place, value in alone[1].items():
        assert found[place] == pytest.approx(value, rel=1e-3, abs=1e-6), place
