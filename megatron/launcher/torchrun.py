"""`launcher: torchrun`: the same command is given on each machine, by hand or by a cluster's scheduler, and nothing is reached over ssh."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.config.section import ConfigError
from megatron.launcher.local import PROGRAM
from megatron.launcher.machines import Machines, is_this_machine

NODE_RANK = ("PET_NODE_RANK", "NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables that say which machine this is: torchrun's own, the usual one, those of SLURM and of a Kubernetes job."""


class Node(NamedTuple):
    """This machine among those of the run: its place, how many there are, its slots, and where all meet."""

    rank: int
    machines: int
    slots: tuple[int, ...]
    address: str


def this_node(chosen: Machines, master_addr: str | None) -> Node:
    """This machine's line of the hostfile: the one that the environment numbers, else the one that names this machine. Raises ConfigError."""
    hosts = list(chosen.slots)
    given = next((name for name in NODE_RANK if os.environ.get(name, "").isdecimal()), None)
    if given is not None and not (len(hosts) == 1 and is_this_machine(hosts[0])):
        rank = int(os.environ[given])
        if rank >= len(hosts):
            raise ConfigError(
                [f"{given} is {rank} in the environment, but {chosen.hostfile} names {len(hosts)} machine(s), from 0 to {len(hosts) - 1}"]
            )
    else:
        here = [rank for rank, host in enumerate(hosts) if is_this_machine(host)]
        if len(here) != 1:
            which = "none of its machines is this one" if not here else f"{' and '.join(hosts[rank] for rank in here)} are all this machine"
            raise ConfigError([f"{chosen.hostfile}: {which}; say which one this is: set NODE_RANK in the environment, from 0 to {len(hosts) - 1}"])
        rank = here[0]
    return Node(rank, len(hosts), tuple(chosen.slots[hosts[rank]]), master_addr or hosts[0])


def torchrun_command(node: Node, port: int, worker: Sequence[str]) -> tuple[str, ...]:
    """torchrun with the words of a worker, its script first. Each worker has a process of ours as its parent, which sees how it ends."""
    meeting = ["--rdzv-backend=static", f"--master-addr={node.address}", f"--master-port={port}"]
    counts = [f"--nnodes={node.machines}", f"--node-rank={node.rank}", f"--nproc-per-node={len(node.slots)}", "--max-restarts=0"]
    return (sys.executable, "-m", "torch.distributed.run", *counts, *meeting, PROGRAM, *worker)


def devices(slots: Sequence[int | str], gpus: int) -> Mapping[str, str]:
    """CUDA_VISIBLE_DEVICES for the slots of a machine with GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))} if gpus else {}
