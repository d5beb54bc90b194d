"""The plan holds what real gloo processes hold: weights and optimizer to the byte, activations within a tenth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.testing.distributed import run_distributed
from tests.analysis.plan.measured import PIPELINE, ROOMY, measure, planned
from tests.invariants.equivalence import MODELS

LAYERS: dict[str, Any] = {"checkpoint_activations": True}
MODULES: dict[str, Any] = {"recompute_modules": ["attention", "moe"]}
TP2: dict[str, Any] = {"model_parallel_size": 2}
PP2: dict[str, Any] = {"pipe_parallel_size": 2, **PIPELINE}
EP2: dict[str, Any] = {"moe_expert_parallel_size": 2}
BF16: dict[str, Any] = {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


QUICK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "structmoe, TP2, layers": ("structmoe", 2, TP2 | LAYERS),
    "mixtral, EP2, ZeRO 1": ("mixtral", 2, EP2 | zero(1)),
    "dense, PP2": ("dense", 2, PP2),
}
EVERY: dict[str, dict[str, Any]] = {
    "TP2": TP2,
    "TP2, layers": TP2 | LAYERS,
    "SP": TP2 | {"sequence_parallel": True},
    "PP2": PP2,
    "PP2, layers": PP2 | LAYERS,
    "EP2": EP2,
    "EP2, layers": EP2 | LAYERS,
    "EP2, attention and moe": EP2 | MODULES,
    "ZeRO 1": zero(1),
    "ZeRO 1, bf16": zero(1) | BF16,
    "ZeRO 2": zero(2),
    "ZeRO 0, bf16": BF16,
    "EP2, ZeRO 1": EP2 | zero(1),
}
FOUR: dict[str, dict[str, Any]] = {
    "TP2 x PP2": TP2 | PP2,
    "PP2 x EP2, layers": PP2 | EP2 | LAYERS,
    "TP2 x EP2": TP2 | EP2,
    "TP2 x DP2, ZeRO 1": TP2 | zero(1),
    "EP2 x DP2, ZeRO 1": EP2 | zero(1),
}
SLOW = {
    f"{model}, {name}": (model, processes, keys)
    for model in ("dense", "mixtral", "structmoe")
    for processes, ways in ((2, EVERY), (4, FOUR))
    for name, keys in ways.items()
    if (model != "dense" or "EP2" not in name) and f"{model}, {name}" not in QUICK
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_plan_holds_what_processes_hold(name: str) -> None:
    model, processes, keys = (SLOW | QUICK)[name]
    values: Mapping[str, Any] = {**MODELS[model], **ROOMY, **keys}
    real = run_distributed(measure, processes, values, backend=None)
    plan = [planned(values, processes, rank) for rank in range(processes)]
    assert [held.weights for held in plan] == [held.weights for held in real]
    assert [held.optimizer for held in plan] == [held.optimizer for held in real]
    if "EP2" not in name and "TP2" not in name:  # elsewhere the routers decide how the sum is shared out
        assert [held.kept for held in plan] == pytest.approx([held.kept for held in real], rel=0.1)
    assert sum(held.kept for held in plan) == pytest.approx(sum(held.kept for held in real), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "mixtral", "structmoe"])
def test_zero_3_divides_weights_and_optimizer_as_planned(model: str) -> None:
    values = {**MODELS[model], **ROOMY, **zero(3)}
    real, plan = run_distributed(measure, 2, values, backend=None), [planned(values, 2, rank) for rank in (0, 1)]
    assert [(held.weights, held.optimizer) for held in plan] == [(held.weights, held.optimizer) for held in real]


def test_recomputation_and_sharing_change_what_is_kept() -> None:
    values = {**MODELS["structmoe"], **ROOMY}
    everything, layers = planned(values, 1, 0), planned({**values, **LAYERS}, 1, 0)
    assert layers.kept < everything.kept / 4
    assert layers.optimizer == everything.optimizer
    assert planned({**values, **TP2}, 2, 0).weights < everything.weights
