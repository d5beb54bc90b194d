"""The place of this process among all processes: a value that is made once and passed to the code that needs it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


class TopologyError(ValueError):
    """The numbers of processes do not fit together."""


@dataclass(frozen=True)
class Topology:
    """The grid of processes. Every process is a data-parallel replica: it holds the whole model and its own part of each batch."""

    world_size: int = 1
    """Processes in all."""
    rank: int = 0
    """This process, from 0."""
    local_rank: int = 0
    """This process among those on its machine, from 0."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise TopologyError(f"world_size = {self.world_size}: must be at least 1")
        for name, value in (("rank", self.rank), ("local_rank", self.local_rank)):
            if not 0 <= value < self.world_size:
                raise TopologyError(f"{name} = {value}: must be from 0 to {self.world_size - 1} (world_size is {self.world_size})")

    @property
    def data_parallel_size(self) -> int:
        """Replicas that a global batch is shared out among."""
        return self.world_size

    @property
    def data_parallel_rank(self) -> int:
        """This process's place among the replicas."""
        return self.rank

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all (logs, manifests)."""
        return self.rank == 0


def current_topology() -> Topology:
    """The topology of the initialised `torch.distributed` and the launcher's LOCAL_RANK. Without a process group: a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Topology()
    rank = torch.distributed.get_rank()
    given = os.environ.get("LOCAL_RANK", str(rank))
    if not given.isdigit():
        raise TopologyError(f"LOCAL_RANK = '{given}': must be a number from 0; the launcher sets it")
    return Topology(torch.distributed.get_world_size(), rank, int(given))
