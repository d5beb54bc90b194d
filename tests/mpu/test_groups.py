"""The grid of processes, the groups in it, and the collectives with gradients over them."""

from __future__ import annotations

import pytest
import torch

from megatron.mpu.groups import current_groups, make_groups
from megatron.mpu.regions import InnerRegion, Region, gather, part, reduced_part
from megatron.mpu.topology import Layout, Place, Topology, TopologyError, current_topology
from megatron.testing.distributed import run_distributed


def test_ranks_count_tensor_then_data_then_pipe() -> None:
    topology = Topology(16, 13, 5, Layout(tensor=2, pipe=2, expert=2))
    assert topology.place == Place(pipe=1, data=2, tensor=1)
    assert topology.rank_of(topology.place) == 13
    assert (topology.data_parallel_size, topology.expert_rank) == (4, 0)
    assert topology.group_ranks("tensor")[:2] == [[0, 1], [2, 3]]
    assert topology.group_ranks("data")[0] == [0, 2, 4, 6]
    assert topology.group_ranks("pipe")[0] == [0, 8]
    assert topology.group_ranks("model")[0] == [0, 1, 8, 9]
    assert topology.group_ranks("expert")[0] == [0, 2]
    assert topology.group_ranks("expert_data")[0] == [0, 4]


@pytest.mark.parametrize(
    ("processes", "layout", "message"),
    [
        (6, Layout(tensor=4), r"model_parallel_size \(4\) x pipe_parallel_size \(1\) = 4 .* 6 process\(es\) .* start 4 or 8 processes"),
        (2, Layout(tensor=2, pipe=2), r"= 4 processes hold the model once, and 2 process\(es\) .* start 4 processes"),
        (6, Layout(expert=4), r"'moe_expert_parallel_size' = 4: .* there are 6 of them .* use 3, or start 8 processes"),
        (4, Layout(tensor=0), "'model_parallel_size' = 0: must be at least 1"),
    ],
)
def test_layouts_that_do_not_fit(processes: int, layout: Layout, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology(processes, layout=layout)


def groups_here(layout: Layout) -> list[tuple[int, ...]]:
    before = [group.ranks for group in current_groups()]
    assert before[2] == (0, 1, 2, 3)  # without a layout all are replicas
    groups = make_groups(current_topology(layout))
    assert current_groups() is groups
    total = groups.tensor.sum(torch.tensor([torch.distributed.get_rank()]))
    assert total.item() == sum(groups.tensor.ranks)
    return [group.ranks for group in groups]


def test_groups_of_four_processes() -> None:
    (first, *_, last) = run_distributed(groups_here, 4, Layout(tensor=2, expert=2))
    assert first == [(0, 1), (0,), (0, 2), (0, 1), (0, 2), (0,)]
    assert last == [(2, 3), (3,), (1, 3), (2, 3), (1, 3), (3,)]


def regions_here() -> None:
    group = make_groups(current_topology(Layout(tensor=2))).tensor
    torch.manual_seed(1)
    first, second = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64), torch.nn.Linear(6, 4, dtype=torch.float64)
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    expected = second(first(whole).tanh())
    expected.cos().sum().backward()
    rows = slice(3 * group.rank, 3 * group.rank + 3)
    up, down = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64), torch.nn.Linear(3, 4, dtype=torch.float64)
    with torch.no_grad():
        up.weight.copy_(first.weight[rows])
        down.weight.copy_(second.weight[:, rows])
        down.bias.copy_(second.bias)
    for sequence in (False, True):
        region, own = Region(group, sequence), x.clone().requires_grad_()
        y = region.row(down, up(region.enter(region.part(own))).tanh())
        torch.testing.assert_close(y, region.part(expected))
        up.zero_grad()
        region.whole(y).cos().sum().backward()
        torch.testing.assert_close(up.weight.grad, first.weight.grad[rows])
        torch.testing.assert_close(own.grad, whole.grad)
    inner = InnerRegion(group)
    torch.testing.assert_close(Region(group).leave(inner.row(down, up(inner.enter(x)).tanh())), expected)
    torch.testing.assert_close(reduced_part(x, group, 1), 2 * part(x, group, 1))
    torch.testing.assert_close(gather(part(x, group, 2), group, 2, summed=True), x)


def test_shared_linear_layers_give_what_one_process_computes() -> None:
    run_distributed(regions_here, 2)
