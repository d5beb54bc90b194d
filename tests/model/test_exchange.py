"""Experts of other processes: uneven and empty exchanges, and the order of the rows."""

from __future__ import annotations

import pytest
import torch

from megatron.model.initialization import build_initializer
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher, overload
from megatron.model.moe.dispatch.local import LocalDispatcher
from megatron.model.moe.dispatch.transport import ExpertShare
from megatron.model.moe.experts.grouped import GroupedExperts
from megatron.model.moe.routing import Routing
from megatron.mpu.exchange import Flight, Splits, exchange, gather_counts
from megatron.mpu.groups import make_groups
from megatron.mpu.topology import Layout, current_topology
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_MOE, tiny_config

EXPERTS = 4


def exchanged(overlapped: bool) -> list[float]:
    """Process 0 sends three rows to process 1 and keeps none; process 1 sends nothing at all."""
    group = make_groups(current_topology(Layout(expert=2))).expert
    splits = Splits([0, 3], [0, 0]) if group.rank == 0 else Splits([0, 0], [3, 0])
    x = torch.arange(sum(splits.sent) * 2.0).view(-1, 2).requires_grad_()
    if overlapped:
        flight = Flight(splits, group)
        received = flight.land(flight.launch(x * 1))
    else:
        received = exchange(x * 1, splits, group)
    assert received.shape == (sum(splits.received), 2)
    (received * (1 + torch.arange(len(received))[:, None])).sum().backward()
    assert gather_counts(torch.tensor(splits.sent), group).tolist() == [[0, 3], [0, 0]]
    return x.grad.flatten().tolist()


@pytest.mark.parametrize("overlapped", [False, True])
def test_rows_and_gradients_find_their_way(overlapped: bool) -> None:
    assert run_distributed(exchanged, 2, overlapped) == [[1, 1, 2, 2, 3, 3], []]


def dispatched(layout: Layout, chosen: str) -> None:
    """Output and gradients of the tokens and weights equal those of all experts on one process, whatever the experts get."""
    groups, config = make_groups(current_topology(layout)), tiny_config(TINY_MOE)
    torch.manual_seed(groups.data.rank)
    choices = {
        "one expert for all": torch.full((6, 2), 3),
        "nothing for the second process": torch.tensor([[0, 1]] * 6),
        "nothing from the second process": torch.randint(EXPERTS, (6 if groups.data.rank == 0 else 0, 2)),
        "uneven": torch.randint(EXPERTS, (6, 2)),
        "empty places": torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [3, 2], [EXPERTS, 1], [2, 0], [1, 3]]),
    }
    expert_TK = choices[chosen]
    x_TD = torch.randn(len(expert_TK), 32, dtype=torch.float64)
    weight_TK = torch.rand(expert_TK.shape, dtype=torch.float64) * (expert_TK < EXPERTS)
    routing = Routing(expert_TK, weight_TK, torch.zeros(0), torch.zeros(0), padded=chosen == "empty places")
    whole = GroupedExperts(config.model, config.moe, build_initializer(config.model, 1)).double()
    alone_TD = x_TD.clone().requires_grad_()
    expected = LocalDispatcher(config.moe).run(alone_TD, routing, whole)
    expected.y_TD.square().sum().backward()

    share = ExpertShare(EXPERTS, groups.expert, groups.tensor)
    own = GroupedExperts(config.model, config.moe, build_initializer(config.model, 1)).double()
    for name, parameter in own.named_parameters():
        rows = parameter.shape[0] // EXPERTS
        parameter.data = whole.get_parameter(name).data[share.first * rows : (share.first + share.here) * rows].clone()
    own.num_experts = own.mlp.num_experts = share.here
    together_TD = x_TD.clone().requires_grad_()
    found = AllToAllDispatcher(config.moe, share).run(together_TD, routing, own)
    y_TD = groups.tensor.sum(found.y_TD)
    torch.testing.assert_close(y_TD, expected.y_TD)
    assert found.rows_E.tolist() == expected.rows_E.tolist()
    found.y_TD.backward(2 * y_TD)
    torch.testing.assert_close(groups.tensor.sum(together_TD.grad), alone_TD.grad)
    for name, parameter in own.named_parameters():
        rows = parameter.shape[0] // share.here
        every = groups.data.sum(whole.get_parameter(name).grad)
        torch.testing.assert_close(parameter.grad, every[share.first * rows : (share.first + share.here) * rows])


@pytest.mark.parametrize(
    "chosen", ["one expert for all", "nothing for the second process", "nothing from the second process", "uneven", "empty places"]
)
def test_two_processes_compute_what_one_does(chosen: str) -> None:
    run_distributed(dispatched, 2, Layout(expert=2), chosen)


def test_four_processes_that_share_in_both_ways_do_too() -> None:
    run_distributed(dispatched, 4, Layout(tensor=2, expert=2), "empty places")


def test_the_overload_is_the_most_over_the_mean() -> None:
    assert overload(torch.tensor([[6.0], [2.0]]), rows=6, seconds=0.3).tolist() == pytest.approx([1.5, 3 * 0.05 * 2])
    assert overload(torch.zeros(2, 1), rows=0, seconds=0.0).tolist() == [0.0, 0.0]
