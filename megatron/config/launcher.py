"""How many processes run where. Keys that only several machines need go to DeepSpeed's launcher as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import PositiveInt, Problem, Section


class LauncherConfig(Section):
    num_gpus: PositiveInt | None = None
    """Processes on this machine, one per GPU, or sharing the cores without GPUs (`num_processes` is the same). None: every GPU, or one process."""
    global_num_gpus: PositiveInt | None = None
    """Processes over all machines; has to agree with the hostfile, where there is one. None: counted."""
    hostfile: str | None = None
    """File with `host slots=N` lines, read by DeepSpeed. None: the one that DLTS_HOSTFILE names, else /job/hostfile; without it this machine."""
    include: str | None = None
    """Hosts and slots to use, DeepSpeed's syntax. None: all."""
    exclude: str | None = None
    """Hosts and slots to leave out, DeepSpeed's syntax. None: none."""
    num_nodes: Annotated[int, Field(ge=-1)] = -1
    """Machines to use from the hostfile, the first ones; -1 is all. Not together with include or exclude."""
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port on which processes meet; on one machine a free one is taken when it is busy."""
    master_addr: str | None = None
    """Address on which processes meet. None: found by the launcher."""
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm"] = "pdsh"
    """DeepSpeed's way to start processes on several machines."""
    deepspeed_slurm: bool = False
    """The same as `launcher: slurm`."""
    force_multi: bool = False
    """Use the launcher for several machines even with one host."""
    no_ssh_check: bool = False
    """Do not try to reach the hosts through ssh before starting."""
    comment: str | None = None
    """Comment for the cluster's scheduler. None: none."""
    account: str | None = None
    """Account for the cluster's scheduler. None: none."""
    plugins: list[str] = []
    """Python modules to import first: they register routers, experts and losses."""
    threads_per_process: PositiveInt | None = None
    """CPU threads of each process. None: the cores shared out evenly."""

    def check(self) -> Iterator[Problem]:
        if self.include is not None and self.exclude is not None:
            yield Problem(("exclude", "include"), "give only one of include and exclude")
