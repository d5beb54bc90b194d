"""The place of this process among all processes: a value that is made once and passed to the code that needs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron.config.parallel import ONE, Layout, layout_problem

__all__ = ["ONE", "Layout", "Place", "Topology", "TopologyError", "current_topology"]


class TopologyError(ValueError):
    """The numbers of processes do not fit together."""


class Place(NamedTuple):
    """Coordinates of a process in the grid. Ranks count tensor first, then data, then pipe, as in DeepSpeed's PipeModelDataParallelTopology."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """The grid of processes: pipeline stages x data-parallel replicas x tensor-parallel processes. Experts are shared by neighbours among the
    replicas.

    Raises TopologyError when the numbers do not fit together.
    """

    world_size: int = 1
    """Processes in all."""
    rank: int = 0
    """This process, from 0."""
    local_rank: int = 0
    """This process among those on its machine, from 0."""
    layout: Layout = ONE

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise TopologyError(f"world_size = {self.world_size}: must be at least 1")
        for name, value in (("rank", self.rank), ("local_rank", self.local_rank)):
            if not 0 <= value < self.world_size:
                raise TopologyError(f"{name} = {value}: must be from 0 to {self.world_size - 1} (world_size is {self.world_size})")
        if problem := layout_problem(self.layout, self.world_size):
            raise TopologyError(problem)

    @property
    def place(self) -> Place:
        """The coordinates of this process."""
        return self.place_of(self.rank)

    def place_of(self, rank: int) -> Place:
        """The coordinates of any process."""
        rest, tensor = divmod(rank, self.layout.tensor)
        pipe, data = divmod(rest, self.data_parallel_size)
        return Place(pipe, data, tensor)

    def rank_of(self, place: Place) -> int:
        """The process at these coordinates."""
        return (place.pipe * self.data_parallel_size + place.data) * self.layout.tensor + place.tensor

    @property
    def data_parallel_size(self) -> int:
        """Replicas that a global batch is shared out among."""
        return self.world_size // self.layout.model

    @property
    def data_parallel_rank(self) -> int:
        """This process's place among the replicas."""
        return self.place.data

    @property
    def tensor_rank(self) -> int:
        """This process's place among those that share its layers."""
        return self.place.tensor

    @property
    def pipe_rank(self) -> int:
        """The pipeline stage of this process."""
        return self.place.pipe

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this process holds."""
        return self.place.data % self.layout.expert

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all (logs, manifests)."""
        return self.rank == 0

    def group_ranks(self, kind: str) -> list[list[int]]:
        """All groups of a kind, each the ranks in it in ascending order: `tensor`, `pipe`, `data`, `model` (a whole copy of what is not an expert),
        `expert` (a whole set of experts), `expert_data` (the copies of the same experts)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            groups.setdefault(_KINDS[kind](self.place_of(rank), self.layout.expert), []).append(rank)
        return list(groups.values())


_KINDS = {
    "tensor": lambda place, expert: (place.pipe, place.data),
    "pipe": lambda place, expert: (place.data, place.tensor),
    "data": lambda place, expert: (place.pipe, place.tensor),
    "model": lambda place, expert: (place.data,),
    "expert": lambda place, expert: (place.pipe, place.tensor, place.data // expert),
    "expert_data": lambda place, expert: (place.pipe, place.tensor, place.data % expert),
}
"""Which coordinates the members of a group have in common."""


def current_topology(layout: Layout = ONE) -> Topology:
    """The topology of the initialised `torch.distributed` and the launcher's LOCAL_RANK. Without a process group: a single process.

    Raises TopologyError where `layout` does not fit the number of processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Topology(layout=layout)
    rank = torch.distributed.get_rank()
    given = os.environ.get("LOCAL_RANK", str(rank))
    if not given.isdigit():
        raise TopologyError(f"LOCAL_RANK = '{given}': must be a number from 0; the launcher sets it")
    return Topology(torch.distributed.get_world_size(), rank, int(given), layout)
