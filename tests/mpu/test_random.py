"""Random numbers of processes that share a layer."""

from __future__ import annotations

import torch

from megatron.mpu.groups import make_groups
from megatron.mpu.random import SharedDropout, own_stream
from megatron.mpu.regions import Region
from megatron.mpu.topology import Layout, current_topology
from megatron.testing.distributed import run_distributed
from tests.invariants.equivalence import MODELS, measure


def draws() -> dict[str, list[float]]:
    group = make_groups(current_topology(Layout(tensor=2))).tensor
    torch.manual_seed(5)
    found = {"before": torch.rand(2).tolist()}
    state = torch.get_rng_state()
    with own_stream(group):
        found["inside"] = torch.rand(2).tolist()
    found["after"] = torch.rand(2).tolist()
    torch.set_rng_state(state)
    with own_stream(group):
        found["again"] = torch.rand(2).tolist()
    dropout = SharedDropout(0.5)
    found["outside of a sequence"] = dropout(torch.ones(16)).tolist()
    dropout.region = Region(group, sequence=True)
    found["of a sequence"] = dropout(torch.ones(16)).tolist()
    return found


def test_processes_stay_in_step_outside_and_differ_inside() -> None:
    first, second = run_distributed(draws, 2)
    for name in ("before", "after", "outside of a sequence"):
        assert first[name] == second[name], name
    for name in ("inside", "of a sequence"):
        assert first[name] != second[name], name
    assert first["inside"] == first["again"], "a recomputation draws the same numbers"


def test_a_model_with_dropout_is_the_same_on_all_processes() -> None:
    """Hidden states would drift apart, and losses with them, if the processes dropped different numbers between the shared parts."""
    values = {**MODELS["dense"], "hidden_dropout": 0.2, "attention_dropout": 0.2, "model_parallel_size": 2, "checkpoint_activations": True}
    first, second = run_distributed(measure, 2, values, 3)
    assert first.losses == second.losses
    assert first.norms == second.norms
