"""What `deepy.py --dry-run` prints: the command, and the environment on each machine. Nothing is started, and no machine is asked for anything."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from megatron.launcher.plan import Launch

PREPENDED = {
    "openmpi": "OMPI_COMM_WORLD_RANK",
    "mvapich": "MV2_COMM_WORLD_RANK",
    "mpich": "PMI_RANK",
    "impi": "RANK",
    "slurm": "SLURM_PROCID",
}
"""Where a process reads its rank, if its launcher does not set RANK."""
UNKNOWN = "(the first machine of SLURM's list)"


def dry_run(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """`environment`: of the shell, so that only what the launch adds or changes is shown."""
    return "\n".join(_lines(launch, environment)) + "\n"


def _lines(launch: Launch, environment: Mapping[str, str]) -> Iterator[str]:
    total = sum(map(len, launch.slots.values()))
    machines = len(launch.slots)
    yield f"{total} {'process' if total == 1 else 'processes'} on {machines} {'machine' if machines == 1 else 'machines'}. Nothing is started."
    yield ""
    yield f"The command{'' if launch.program in (None, 'torchrun') or machines == 1 else ' (on this machine, for all)'}:"
    yield f"  {shlex.join(launch.argv)}"
    if launch.stop:
        yield "The command that ends the processes, if this one is stopped:"
        yield f"  {shlex.join(launch.stop)}"
    yield "Its environment, besides that of this shell:"
    added = {name: value for name, value in launch.env.items() if environment.get(name) != value}
    yield from (f"  {name}={shlex.quote(value)}" for name, value in sorted(added.items()))
    first = 0
    for host, slots in launch.slots.items():
        yield from _machine(launch, host, slots, first, total)
        first += len(slots)


def _machine(launch: Launch, host: str, slots: Sequence[int | str], first: int, total: int) -> Iterator[str]:
    """The environment of the processes of a machine; `first`: the rank of its first process."""
    count = len(slots)
    yield ""
    yield f"{host}: {'rank' if count == 1 else 'ranks'} {span(first, count)}"
    if launch.program is None:
        yield "  the process sets RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 and MASTER_ADDR=127.0.0.1 for itself"
        return
    shared = {"WORLD_SIZE": total, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": launch.meeting.address or UNKNOWN, "MASTER_PORT": launch.meeting.port}
    yield from (f"  {name}={value}" for name, value in shared.items())
    source = PREPENDED.get(launch.program)
    read = "" if source in (None, "RANK") else f"   (read from {source})"
    yield f"  RANK={span(first, count)} LOCAL_RANK={span(0, count)}{read}"
    if launch.program == "pdsh":  # DeepSpeed's launcher on each machine sets it
        yield f"  CUDA_VISIBLE_DEVICES={','.join(map(str, slots))}"


def span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}..{first + count - 1}"
