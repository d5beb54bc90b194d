"""The search: which layouts there are, in which order, and that its short way gives what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.analysis.plan.efficiency import STACKS
from megatron.analysis.plan.estimate import Cluster, check_layout, collectives, estimate
from megatron.analysis.plan.layouts import Choice, Search
from megatron.analysis.plan.machine import PlanError, load_machine
from megatron.config import config_from_dict
from megatron.config.parallel import Layout
from megatron.config.section import ConfigError
from tests.analysis.plan.measured import ROOMY
from tests.invariants.equivalence import MODELS

CLUSTER = Cluster(load_machine("h100-80gb"), 8, 1.0, STACKS["this"])
VALUES: dict[str, Any] = {**MODELS["structmoe"], **ROOMY, "num_layers": 4, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}


@pytest.fixture(scope="module")
def search() -> Search:
    return Search(config_from_dict(VALUES), 128, CLUSTER, 16)


def test_layouts_that_cannot_work_are_not_there(search: Search) -> None:
    layouts = search.layouts()
    assert Layout(1, 1, 4) in layouts
    assert Layout(2, 2, 2) in layouts
    assert Layout(8, 1, 1) not in layouts  # 4 heads
    assert Layout(1, 8, 1) not in layouts  # 4 layers
    assert Layout(4, 1, 2) not in layouts  # 4 experts


def test_the_fastest_comes_first_and_everything_fits(search: Search) -> None:
    calls: list[None] = []
    found = search.run([Layout(), Layout(1, 2, 1)], lambda: calls.append(None))
    speeds = [each.estimate.tokens_per_gpu for each in found]
    assert len(calls) == 2
    assert speeds == sorted(speeds, reverse=True)
    assert {each.choice.zero for each in found if each.choice.layout.pipe == 2} == {0, 1}
    assert all(each.choice.micro * 8 // each.choice.layout.pipe <= 16 for each in found)


@pytest.mark.parametrize("choice", [Choice(Layout(), 1, 2, "none"), Choice(Layout(1, 2, 2), 1, 2, "layers")])
def test_a_layout_found_costs_what_the_whole_trace_says(search: Search, choice: Choice) -> None:
    zero = {"zero_optimization": {"stage": choice.zero}}
    whole = estimate(config_from_dict({**VALUES, **choice.keys(), **zero}), 128, CLUSTER)
    short = next(each.estimate for each in search.run([choice.layout], lambda: None) if each.choice == choice)
    assert short.seconds == pytest.approx(whole.seconds, rel=0.01)
    if choice.layout.pipe == 2:
        sent = collectives(whole.stages[0], whole.batch)["send of pipe (2)"]
        assert sent == (2, 2 * 2 * 64 * 64 * 4)  # hidden states of two micro-batches of two sequences
    for one, other in zip(short.stages, whole.stages, strict=True):
        assert one.memory.optimizer == other.memory.optimizer
        assert one.memory.total == pytest.approx(other.memory.total, rel=0.01)


def test_skew_costs_time_and_memory_where_experts_are_divided() -> None:
    config = config_from_dict({**VALUES, "moe_expert_parallel_size": 4, "hidden_size": 256, "intermediate_size": 2048})
    even, skewed = (estimate(config, 128, CLUSTER.__class__(CLUSTER.machine, 8, skew, CLUSTER.stack)) for skew in (1.0, 3.0))
    assert skewed.seconds > even.seconds
    assert skewed.memory.activations > even.memory.activations


def test_what_does_not_fit_is_a_sentence() -> None:
    config = config_from_dict(VALUES)
    machine, stack = CLUSTER.machine, CLUSTER.stack
    with pytest.raises(PlanError, match="must be from 1"):
        check_layout(config, Cluster(machine, 8, 0.5, stack))
    with pytest.raises(PlanError, match="use 8 or 16, or say with --gpus-per-node"):
        check_layout(config, Cluster(machine, 12, 1.0, stack))
    with pytest.raises(PlanError, match="has no experts"):
        check_layout(config_from_dict({**MODELS["dense"]}), Cluster(machine, 8, 1.5, stack))
    with pytest.raises(ConfigError, match="start 2 processes"):
        check_layout(config_from_dict({**VALUES, "model_parallel_size": 2}), Cluster(machine, 1, 1.0, stack))
    uneven = config_from_dict({key: value for key, value in VALUES.items() if key != "moe_num_experts"} | {"moe_num_experts_by_layer": [2, 4, 4, 4]})
    with pytest.raises(PlanError, match="--layouts 0"):
        Search(uneven, 128, CLUSTER, 16).layouts()
