"""Chosen steps of a run leave their routing in files: the experts and LoREs that the layers counted, for the tokens that the step read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.loader import LoadedConfig
from megatron.config.section import ConfigError
from megatron.monitor.guarded import OutputFailed
from megatron.monitor.routing_trace import read_trace
from megatron.monitor.trace_parts import read_parts
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, tiny_config
from tests.training.runs import run_values, train_losses


def traced(corpus: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    length = {"train_iters": 4, "eval_iters": 1, "eval_interval": 2, "gradient_accumulation_steps": 2, "metrics_file": str(folder / "metrics.jsonl")}
    return run_values(corpus, None, **length, routing_trace_steps=[1, 3], routing_trace_dir=str(folder / "traces"), **overrides)


def loads_of(folder: Path, step: int, key: str = "moe/expert_load") -> list[list[int]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(record[key] for record in records if record["iteration"] == step and key in record)


@pytest.mark.parametrize(
    "keys",
    [{}, {"checkpoint_activations": True}, {"recompute_modules": ["moe"]}, {"moe_router_type": "top_p", "moe_top_k": None}, {"moe_zero_experts": 4}],
    ids=["plain", "recomputed layers", "recomputed experts", "top p", "zero experts"],
)
def test_the_trace_of_a_step_is_what_the_layers_counted(corpus: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    train_losses(traced(corpus, tmp_path, **keys))
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["step_00000001", "step_00000003"]
    for step in (1, 3):
        trace = read_trace(tmp_path / "traces" / f"step_{step:08d}" / "data_000_stage_00.npz")
        assert trace.tokens == 2 * 2 * 16  # micro-batches, samples, tokens
        assert set(trace.step_T.tolist()) == {step}
        experts = [np.bincount(layer[layer >= 0], minlength=trace.num_experts).tolist() for layer in trace.expert_TLK.transpose(1, 0, 2)]
        assert experts == loads_of(tmp_path, step)
        assert trace.lore_TLKM is not None
        unit_TLKM = np.where(trace.lore_TLKM < 0, -1, trace.expert_TLK[..., None] * 4 + trace.lore_TLKM)
        lores = [np.bincount(layer[layer >= 0], minlength=16).tolist() for layer in unit_TLKM.transpose(1, 0, 2, 3)]
        assert lores == loads_of(tmp_path, step, "moe/lore_load")
        assert trace.weight_TLK is not None
        assert (np.diff(trace.weight_TLK, axis=-1) <= 0).all()
        assert trace.sequence_T is not None
        assert np.bincount(trace.sequence_T).tolist() == [16] * 4
        assert trace.token_T is not None
        assert trace.pieces is not None
        text = "".join(trace.pieces[token] for token in trace.token_T.tolist())
        assert "fox" in text


def test_a_traced_run_has_the_losses_of_an_untraced_one(corpus: Path, tmp_path: Path) -> None:
    values = traced(corpus, tmp_path)
    with_trace = train_losses(values)
    without = {name: value for name, value in values.items() if not name.startswith("routing_trace")}
    assert train_losses({**without, "metrics_file": str(tmp_path / "other.jsonl")}) == with_trace


def test_an_interval_and_a_limit(corpus: Path, tmp_path: Path) -> None:
    values = {**traced(corpus, tmp_path), "routing_trace_steps": None, "routing_trace_interval": 2, "routing_trace_tokens": 20}
    train_losses(values)
    found = {path.name: read_parts(path) for path in sorted((tmp_path / "traces").iterdir())}
    assert list(found) == ["step_00000002", "step_00000004"]
    for trace in found.values():
        assert trace is not None
        assert trace.token_T is not None
        assert (trace.tokens, len(trace.token_T)) == (20, 20)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"pipe_parallel_size": 2}, {"moe_expert_parallel_size": 2}, {"model_parallel_size": 2}])
def test_parts_of_two_processes_are_the_trace_of_one(corpus: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    optimizer = {"type": "Adam", "params": {"lr": 1e-3}}
    changes = {"gradient_accumulation_steps": None, "train_batch_size": 4, "train_iters": 1, "eval_iters": 0, "optimizer": optimizer}
    one, two = ({**traced(corpus, tmp_path / name), **changes} for name in ("one", "two"))
    train_losses(one)
    run_distributed(train_losses, 2, {**two, **keys}, backend=None)
    first, second = (read_parts(tmp_path / name / "traces" / "step_00000001") for name in ("one", "two"))
    assert first is not None
    assert second is not None
    assert list(second.layers) == [0, 1]
    order, other = (np.lexsort(trace.token_T.reshape(4, 16).T) for trace in (first, second) if trace.token_T is not None)
    assert (second.lore_TLKM is None) == ("pipe_parallel_size" not in keys)
    for name in ("token_T", "expert_TLK", *(["lore_TLKM"] if second.lore_TLKM is not None else [])):
        texts = [getattr(trace, name).reshape(4, -1)[rows].tolist() for trace, rows in ((first, order), (second, other))]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize(
    ("base", "keys", "message"),
    [
        (
            TINY_DENSE,
            {"routing_trace_steps": [1], "routing_trace_dir": "x"},
            r"'routing_trace_steps'.*needs a model with experts \(moe_num_experts\)",
        ),
        (None, {"routing_trace_dir": "x"}, r"'routing_trace_dir'.*needs routing_trace_steps or routing_trace_interval"),
        (None, {"routing_trace_steps": [0], "routing_trace_dir": "x"}, "routing_trace_steps"),
    ],
)
def test_keys_that_do_not_fit_together(base: Any, keys: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(base, **keys) if base is not None else tiny_config(run_values(corpus, None, **keys))


def test_a_trace_that_cannot_be_written_stops_the_run_after_the_step(corpus: Path, tmp_path: Path) -> None:
    from megatron.training.run import train

    (tmp_path / "traces").write_text("a file is in the way")
    with pytest.raises(OutputFailed, match=r"traces/step_00000001.* cannot be written"):
        train(LoadedConfig(tiny_config(traced(corpus, tmp_path))))
