"""Layouts that cannot work are refused in words, with the nearest one that would."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.loader import load_config
from megatron.config.neox import data_parallel_size
from megatron.config.parallel import Layout, layout_problem
from megatron.config.section import ConfigError
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE, tiny_config

EXPERTS = dict(TINY_MOE)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_parallel_size": 3}, r"'model_parallel_size' = 3: must divide num_attention_heads \(4\); use 2"),
    (
        {"num_attention_heads": 12, "hidden_size": 48, "num_kv_heads": 3, "model_parallel_size": 2},
        r"must divide num_kv_heads \(3\), or be a multiple",
    ),
    (
        {"model_parallel_size": 2, "sequence_parallel": True, "seq_length": 15},
        r"'sequence_parallel' = true: needs seq_length \(15\) to be a multiple",
    ),
    ({"moe_expert_parallel_size": 2}, "'moe_expert_parallel_size' = 2: needs experts: give moe_num_experts, or use 1"),
    ({**EXPERTS, "moe_expert_parallel_size": 3}, r"'moe_expert_parallel_size' = 3: must divide the experts of a layer, and 4 experts / .* use 2"),
    ({**EXPERTS, "moe_expert_parallel_size": 8}, r"must divide the experts of a layer, .* use 4"),
    ({**EXPERTS, "moe_num_experts": 3, "model_parallel_size": 2}, r"'model_parallel_size' = 2: must divide the experts of a layer \(3\).* use 1"),
    ({**EXPERTS, "moe_expert_parallel_size": 4, "model_parallel_size": 2}, r"4 experts / model_parallel_size \(2\) = 2; use 2"),
    ({**EXPERTS, "moe_expert_parallel_size": 2, "zero_optimization": {"stage": 3}}, "cannot be combined with zero_optimization.stage 3"),
    ({"model_parallel_size": 4, "num_kv_heads": 2, "zero_optimization": {"stage": 1}}, r"is more than num_kv_heads \(2\).* use 2, or zero"),
    ({"pipe_parallel_size": 2, "zero_optimization": {"stage": 3}}, "needs zero_optimization.stage 0 or 1, .* or pipe_parallel_size: 0 with stage 3"),
    (
        {"pipe_parallel_size": 2, "pipe_partition_method": "type:mamba"},
        r"'pipe_partition_method' = 'type:mamba': matches none of the layers EmbeddingPipe, .*NormPipe, ParallelLinearPipe",
    ),
    ({"pipe_parallel_size": 2, "flops_profiler": {"enabled": True}}, "'flops_profiler.enabled' = true: profiles a model that is on one process"),
    ({"pipe_parallel_size": 3}, r"'pipe_parallel_size' = 3: must be at most num_layers, because each stage needs a layer; use 2"),
    (
        {**TINY_STRUCTMOE, "model_parallel_size": 2, "moe_tensor_parallel": "width"},
        "width divides experts of moe_expert_type: grouped, not structmoe",
    ),
    ({**EXPERTS, "model_parallel_size": 2, "moe_tensor_parallel": "width", "moe_expert_bias": True}, "width divides experts without biases"),
    ({**EXPERTS, "model_parallel_size": 4, "moe_tensor_parallel": "width", "intermediate_size": 66}, r"must divide the width of an expert \(66\)"),
    ({**EXPERTS, "model_parallel_size": 2, "log_gradient_noise_scale": True}, "measures the gradients of one process only"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_a_layout_that_cannot_work(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(TINY_DENSE, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_parallel_size": 4},
        {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}, "log_gradient_noise_scale": True},
        {"model_parallel_size": 4, "num_kv_heads": 2},
        {"model_parallel_size": 2, "sequence_parallel": True},
        {**EXPERTS, "moe_num_experts": 3, "model_parallel_size": 2, "moe_tensor_parallel": "width"},
        {**EXPERTS, "moe_expert_parallel_size": 2, "model_parallel_size": 2, "zero_optimization": {"stage": 1}},
    ],
)
def test_a_layout_that_works(keys: dict[str, Any]) -> None:
    assert tiny_config(TINY_DENSE, **keys).parallel.layout.model == keys.get("model_parallel_size", 1) * keys.get("pipe_parallel_size", 1)


def test_processes_that_do_not_fit_the_layout() -> None:
    config = tiny_config(TINY_DENSE, model_parallel_size=4)
    assert data_parallel_size(config, 8) == 2
    with pytest.raises(
        ConfigError, match=r"= 4 processes hold the model once, and 6 process\(es\) cannot be divided by that; start 4 or 8 processes"
    ):
        data_parallel_size(config, 6)
    assert layout_problem(Layout(expert=2), 4) is None


def test_sequence_parallel_without_tensor_parallelism_has_a_notice() -> None:
    loaded = load_config(
        [], ["num_layers=2", "hidden_size=32", "num_attention_heads=4", "seq_length=16", "max_position_embeddings=16", "sequence_parallel=true"]
    )
    assert any("'sequence_parallel' has no effect: model_parallel_size is 1" in notice for notice in loaded.notices)
