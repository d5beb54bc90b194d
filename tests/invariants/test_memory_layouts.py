"""What saves memory changes no result in any layout: recomputation, divided inputs and offloading, with shared layers and shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.config import config_from_dict
from megatron.testing.distributed import run_distributed
from tests.invariants.equivalence import MODELS, Variant, compare, measure

OFFLOADED: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
WHOLE: dict[str, Any] = {"checkpoint_activations": True}
DIVIDED: dict[str, Any] = {**WHOLE, "partition_activations": True}
TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}
EP: dict[str, Any] = {"moe_expert_parallel_size": 2}
PP: dict[str, Any] = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
QUICK: dict[str, tuple[str, Variant]] = {
    "TP2, inputs divided": ("structmoe", Variant(2, {**TP, **DIVIDED, "checkpoint_num_layers": 2})),
}
SLOW: dict[str, tuple[str, Variant]] = {
    "TP2, inputs divided, dense": ("dense", Variant(2, {**TP, **DIVIDED})),
    "SP, layers": ("mixtral", Variant(2, {**SP, **DIVIDED})),
    "TP2, attention and experts": ("decomposed", Variant(2, {**TP, "recompute_modules": ["attention", "experts"]})),
    "SP, attention and moe": ("structmoe", Variant(2, {**SP, "recompute_modules": ["attention", "moe"]})),
    "EP2, layers": ("structmoe", Variant(2, {**EP, **WHOLE})),
    "EP2, experts": ("mixtral", Variant(2, {**EP, "recompute_modules": ["experts"]})),
    "EP2, moe": ("structmoe", Variant(2, {**EP, "recompute_modules": ["moe"]})),
    "EP2, ZeRO 1 offloaded": ("mixtral", Variant(2, {**EP, "zero_optimization": {"stage": 1, **OFFLOADED}})),
    "EP2, ZeRO 2 offloaded": ("structmoe", Variant(2, {**EP, "zero_optimization": {"stage": 2, **OFFLOADED}})),
    "PP2, layers": ("structmoe", Variant(2, {**PP, **WHOLE, "checkpoint_num_layers": 2})),
    "PP2, attention and moe": ("mixtral", Variant(2, {**PP, "recompute_modules": ["attention", "moe"]})),
    "PP2 x DP2, ZeRO 1 offloaded": ("structmoe", Variant(4, {**PP, "zero_optimization": {"stage": 1, **OFFLOADED}})),
    "TP2 x PP2, inputs divided": ("structmoe", Variant(4, {**TP, **PP, **DIVIDED})),
    "TP2 x DP2, ZeRO 2 offloaded": ("structmoe", Variant(4, {**TP, "zero_optimization": {"stage": 2, **OFFLOADED}})),
    "TP2 x DP2, ZeRO 3 offloaded": (
        "mixtral",
        Variant(4, {**TP, "zero_optimization": {"stage": 3, **OFFLOADED, "offload_param": {"device": "cpu"}}}),
    ),
    "TP2 x EP2, attention and moe": ("structmoe", Variant(4, {**TP, **EP, "recompute_modules": ["attention", "moe"]})),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_less_memory_gives_the_numbers_of_one_process(name: str) -> None:
    model, variant = (QUICK | SLOW)[name]
    assert compare(MODELS[model], variant, steps=3).problems() == []


def dividers(values: Mapping[str, Any]) -> int:
    """Among how many processes the engine's model divides its kept inputs."""
    from megatron.training.engine import build_engine
    from megatron.training.process import start_process
    from megatron.training.setup import model_of_process

    config = config_from_dict(values)
    topology = start_process(backend="gloo", threads=1, layout=config.parallel.layout)
    return int(build_engine(config, model_of_process(config, 128), world_size=topology.data_parallel_size).module.kept_inputs.group.size)


def test_inputs_are_divided_where_processes_hold_the_same() -> None:
    for keys, expected in ((TP | DIVIDED, 2), (TP | WHOLE, 1), (SP | DIVIDED, 1), (DIVIDED, 1)):
        assert run_distributed(dividers, 2, {**MODELS["dense"], **keys}) == [expected, expected]


def rates(values: Mapping[str, Any]) -> list[tuple[float, ...]]:
    piece = measure(values, 3)
    return [tuple(piece.losses), tuple(piece.norms)]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [DIVIDED, {"recompute_modules": ["attention", "moe"]}], ids=["layers", "modules"])
@pytest.mark.parametrize("layout", [TP, SP], ids=["TP2", "SP"])
def test_dropout_of_shared_layers_is_drawn_again(layout: dict[str, Any], ways: dict[str, Any]) -> None:
    """Processes that share a layer have random numbers of their own inside it; the second forward draws the same."""
    values = {**MODELS["structmoe"], "hidden_dropout": 0.2, "attention_dropout": 0.2, "moe_jitter_eps": 0.1, **layout}
    assert run_distributed(rates, 2, {**values, **ways}) == run_distributed(rates, 2, values)
