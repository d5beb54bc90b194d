"""The place of this process among all, read from the environment that its launcher set: under the names of torchrun, SLURM or an MPI.

RANK, WORLD_SIZE                this process from 0, and how many there are
LOCAL_RANK, LOCAL_WORLD_SIZE    the same on its machine
MASTER_ADDR, MASTER_PORT        where they meet
"""

from __future__ import annotations

import re
import socket
from collections.abc import MutableMapping
from typing import NamedTuple

Environment = MutableMapping[str, str]


class LaunchError(ValueError):
    """The environment does not say the place of this process among all."""


class Launcher(NamedTuple):
    """A launcher's names for the four numbers. The launcher is in use if `world_size` is more than 1."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_LAUNCHERS = {
    # SLURM sets SLURM_STEP_NUM_TASKS in the tasks of srun only, and SLURM_NTASKS in batch scripts and shells as well.
    "srun": Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "Open MPI": Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH": Launcher("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH 3": Launcher("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE", "MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
    # Hydra, the process manager of MPICH and Intel MPI.
    "MPICH or Intel MPI": Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def complete_environment(environment: Environment, *, master_addr: str | None = None, master_port: int = 29500) -> None:
    """Fills in all six names: from srun's or an MPI's where RANK is missing; a process that no launcher started is rank 0 of 1, at a free port.

    `master_addr` and `master_port` serve where the launcher gave no place to meet (`master_addr` None: the first machine of SLURM's list). Raises
    LaunchError if a variable is missing or is not a number.
    """
    name = next((name for name, names in _LAUNCHERS.items() if _number(environment.get(names.world_size)) > 1), None)
    if "RANK" not in environment and name is not None:
        _translate(environment, name, master_addr, master_port)
    if "RANK" not in environment:
        if _number(environment.get("WORLD_SIZE", "1")) != 1:
            raise LaunchError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']!r} in the environment, but RANK is missing; set both, or neither of them for one process"
            )
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if "WORLD_SIZE" not in environment:
        raise LaunchError(
            f"RANK is {environment['RANK']!r} in the environment, but WORLD_SIZE is missing; set both, or neither of them for one process"
        )
    environment.setdefault("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", environment["WORLD_SIZE"]))
    _check(environment)


def _translate(environment: Environment, name: str, master_addr: str | None, master_port: int) -> None:
    names = _LAUNCHERS[name]
    missing = [key for key in (names.rank, names.local_rank) if key not in environment]
    if missing:
        raise LaunchError(
            f"{names.world_size} is {environment[names.world_size]!r} in the environment, as {name} sets it, but {missing[0]} is missing"
        )
    environment.update(RANK=environment[names.rank], WORLD_SIZE=environment[names.world_size], LOCAL_RANK=environment[names.local_rank])
    here = environment.get(names.local_world_size)
    if here is not None:
        environment["LOCAL_WORLD_SIZE"] = _tasks_here(here, _number(environment.get("SLURM_NODEID", "0"))) if name == "srun" else here
    if "MASTER_ADDR" not in environment:
        address = master_addr or _first_host(environment.get("SLURM_STEP_NODELIST", "") if name == "srun" else "")
        if address is None and environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]:
            address = "127.0.0.1"
        if address is None and name != "srun":
            address = _first_host(environment.get("SLURM_JOB_NODELIST", ""))  # an MPI in an allocation of SLURM's
        if address is None:
            raise LaunchError(
                f"{name} started {environment['WORLD_SIZE']} processes but gave no address where they can meet; set master_addr or MASTER_ADDR"
            )
        environment["MASTER_ADDR"] = address
    environment.setdefault("MASTER_PORT", str(master_port))


def _first_host(hosts: str) -> str | None:
    """`gpu[03-05,9],login` -> gpu03, the first machine of SLURM's list; None for an empty list."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", hosts)
    return None if found is None else found[1] + (found[2] or "")


def _tasks_here(counts: str, node: int) -> str:
    """SLURM's tasks on each machine, `4(x2),3` for 4, 4 and 3: those on machine `node`."""
    each = [count for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    if node >= len(each):
        raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {counts!r} in the environment, but it has no number for SLURM_NODEID {node}")
    return each[node]


def _check(environment: Environment) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if key in environment and _number(environment[key]) < 0:
            raise LaunchError(f"{key} is {environment[key]!r} in the environment: it must be a number. The launcher sets it")
    rank, processes = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= processes:
        raise LaunchError(f"RANK is {rank} in the environment: it must be from 0 to {processes - 1}, because WORLD_SIZE is {processes}")
    if processes == 1:
        for key, value in (("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(_free_port()))):
            environment.setdefault(key, value)
    missing = next((key for key in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in environment), None)
    if missing is not None:
        raise LaunchError(f"WORLD_SIZE is {processes} in the environment, but {missing} is missing; deepy.py and torchrun set all of them")


def _number(text: str | None) -> int:
    """-1 for what is none."""
    return int(text) if text is not None and text.isdecimal() else -1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
