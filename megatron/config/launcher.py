"""How many processes run, and on which machines. Keys for several machines are passed on to DeepSpeed's launcher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import PositiveInt, Problem, Section


class LauncherConfig(Section):
    num_gpus: PositiveInt | None = None
    """Number of processes on this machine (`num_processes` is the same key). With GPUs, each process uses one GPU. Without GPUs, the processes
    share the cores. None: one process for each GPU, or one process."""
    global_num_gpus: PositiveInt | None = None
    """Number of processes on all machines. It must agree with the hostfile, if there is one. None: the launcher counts them."""
    hostfile: str | None = None
    """File with `host slots=N` lines, read by DeepSpeed. None: the file that the environment variable DLTS_HOSTFILE names, else /job/hostfile. If
    there is no hostfile, only this machine is used."""
    include: str | None = None
    """Hosts and slots to use, in DeepSpeed's syntax. None: all."""
    exclude: str | None = None
    """Hosts and slots to leave out, in DeepSpeed's syntax. None: none."""
    num_nodes: Annotated[int, Field(ge=-1)] = -1
    """Number of machines to use: the first ones in the hostfile. -1: all. It cannot be given together with `include` or `exclude`."""
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port on which the processes meet. On one machine, a free port is taken when this one is busy."""
    master_addr: str | None = None
    """Address at which the processes meet. None: the launcher finds it."""
    launcher: Literal["pdsh", "openmpi", "mvapich", "mpich", "impi", "slurm", "torchrun"] = "pdsh"
    """Program that starts processes on several machines, as DeepSpeed names it. With `torchrun`, `deepy.py` starts the processes of its own machine
    only: give the same command on each machine of the hostfile."""
    deepspeed_slurm: bool = False
    """The same as `launcher: slurm`."""
    force_multi: bool = False
    """Use the launcher for several machines even with one host."""
    no_ssh_check: bool = False
    """Do not test the ssh connection to the hosts before the start."""
    comment: str | None = None
    """Comment for the cluster's scheduler, with `launcher: slurm`. None: none."""
    account: str | None = None
    """Account for the cluster's scheduler, with `launcher: slurm`. None: none."""
    plugins: list[str] = []
    """Python modules to import first. They register routers, experts and losses."""
    threads_per_process: PositiveInt | None = None
    """Number of CPU threads of each process. None: the cores are divided evenly."""

    collective_timeout_s: Annotated[float, Field(ge=0)] = 600.0
    """A run of several processes ends when a process has waited for the others for this many seconds within a step. Then the stack of each
    process is printed, the collective operation, the step, and which processes never entered it. The exit status is 124. In the first step, in
    evaluations, while saving and at the start, waiting for a process that works is allowed. 0: the run waits until PyTorch gives up."""

    @property
    def program(self) -> str:
        """The way to start processes on several machines: `launcher`, or slurm."""
        return "slurm" if self.deepspeed_slurm else self.launcher

    def check(self) -> Iterator[Problem]:
        if self.include is not None and self.exclude is not None:
            yield Problem(("exclude", "include"), "cannot be combined with include; give only one of the two")
