"""The process groups of a topology, made once when a process starts. Nothing else makes groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.mpu.topology import Topology


@dataclass(frozen=True)
class Group:
    """Some of the processes, among them this one. A group of one does not communicate."""

    ranks: tuple[int, ...] = (0,)
    """The ranks of its processes among all, ascending."""
    rank: int = 0
    """This process's place in it."""
    handle: Any = None
    """PyTorch's process group; None where there is only one process in all."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the group, as a new tensor; of one process the tensor itself. No gradient. Collective."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.handle)
        return total


ALONE = Group()


class Groups(NamedTuple):
    """The groups of this process, by kind (`Topology.group_ranks`)."""

    tensor: Group = ALONE
    pipe: Group = ALONE
    data: Group = ALONE
    model: Group = ALONE
    expert: Group = ALONE
    expert_data: Group = ALONE


class Process:
    """This process. A process belongs to one run and has one place in it, so its groups are the one thing here that is not passed from call to call:
    losses that look at all replicas, and sums of measurements, ask for them."""

    groups = Groups()


def make_groups(topology: Topology) -> Groups:
    """The groups of this process, which `current_groups` gives from now on. Collective: every process makes all groups in the same order."""
    made: dict[tuple[int, ...], Any] = {}
    own = {}
    for kind in Groups._fields:
        for ranks in map(tuple, topology.group_ranks(kind)):
            if topology.world_size > 1 and ranks not in made:
                made[ranks] = torch.distributed.new_group(list(ranks))
            if topology.rank in ranks:
                own[kind] = Group(ranks, ranks.index(topology.rank), made.get(ranks))
    Process.groups = Groups(**own)
    return Process.groups


def current_groups() -> Groups:
    """The groups that `make_groups` made. Before that, or without a `torch.distributed` group: this process alone, or all of them as replicas."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Groups()
    world = torch.distributed.get_world_size()
    made = Process.groups
    if world > 1 and made.model.size * made.data.size != world:
        everyone = Group(tuple(range(world)), torch.distributed.get_rank(), torch.distributed.group.WORLD)
        return Groups(data=everyone, expert_data=everyone)
    return made if world > 1 else Groups()
