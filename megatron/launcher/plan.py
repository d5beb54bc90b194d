"""What to start: how many processes, on which machines, with which command and environment. Starts nothing itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.launcher import LauncherConfig
from megatron.config.loader import LoadedConfig
from megatron.config.section import ConfigError
from megatron.config.transport import encode
from megatron.launcher import local
from megatron.launcher.machines import Machines, find_hostfile, machines
from megatron.launcher.multinode import Meeting, Multinode
from megatron.launcher.processes import Machine
from megatron.launcher.reach import first_address, reach
from megatron.launcher.torchrun import devices, this_node, torchrun_command


@dataclass(frozen=True)
class Launch:
    """A command and its environment. `slots`: of each machine, in the order of the ranks; `processes`: how many workers the command starts here."""

    argv: tuple[str, ...]
    env: dict[str, str]
    processes: int
    slots: Mapping[str, Sequence[int | str]]
    meeting: Meeting
    program: str | None
    """What starts the workers. None: nothing, the command takes the place of the calling process. `local.PROGRAM`: this process does."""
    stop: tuple[str, ...] = ()
    """The command that ends the workers on other machines. Empty: a signal to the command is enough."""

    @property
    def replaces(self) -> bool:
        return self.program is None


def worker_count(loaded: LoadedConfig, machine: Machine) -> int:
    """Processes in all: as many as DeepSpeed would start on the machines and slots asked for, else as asked for, else one per GPU, else one.

    Raises ConfigError for more processes than GPUs where there are GPUs, and for what DeepSpeed refuses about machines.
    """
    return count_of(loaded.config.launcher, machine, machines(loaded.config.launcher, machine))


def count_of(launcher: LauncherConfig, machine: Machine, chosen: Machines | None) -> int:
    if chosen is not None:
        if launcher.global_num_gpus not in (None, chosen.processes):
            where = chosen.hostfile or "this machine"
            raise ConfigError(
                [f"'global_num_gpus' = {launcher.global_num_gpus}: {chosen.processes} process(es) would start on {where}; make the numbers agree"]
            )
        return chosen.processes
    if launcher.num_gpus is not None and 0 < machine.gpus < launcher.num_gpus:
        raise ConfigError([f"'num_gpus' = {launcher.num_gpus}: this machine has {machine.gpus} GPU(s) to use"])
    if launcher.global_num_gpus is None:
        return launcher.num_gpus or max(1, machine.gpus)
    if launcher.num_gpus not in (None, launcher.global_num_gpus):
        raise ConfigError([f"'global_num_gpus' = {launcher.global_num_gpus}: num_gpus is {launcher.num_gpus}; on one machine give only one of them"])
    return launcher.global_num_gpus


def plan_launch(script: Path, loaded: LoadedConfig, machine: Machine, *, ask: bool = True) -> Launch:
    """The command that starts the script's workers. Raises ConfigError as worker_count does, and LaunchError for a machine that cannot be reached.

    `ask` False: no machine is asked for anything, so the name of the first one may stand where its address will.
    """
    launcher = loaded.config.launcher
    chosen = machines(launcher, machine)
    processes = count_of(launcher, machine, chosen)
    worker = [str(script), "--megatron_config", encode(loaded)]
    if launcher.program == "torchrun" and (launcher.force_multi or (chosen is not None and chosen.hostfile is not None)):
        return plan_torchrun(loaded, machine, here_alone(processes) if chosen is None else chosen, worker)
    if runs_elsewhere(launcher, chosen):
        return plan_elsewhere(loaded, machine, here_alone(processes) if chosen is None else chosen, worker, ask=ask)
    env = _environment(loaded, machine, processes)
    slots = machine.devices(processes) if chosen is None else next(iter(chosen.slots.values()))
    env |= devices(slots, machine.gpus)
    if processes == 1:
        return Launch((sys.executable, *worker), env, 1, {"localhost": slots}, Meeting(local.ADDRESS, launcher.master_port), None)
    meeting = Meeting(local.ADDRESS, launcher.master_port)
    return Launch(local.local_command(processes, meeting.port, worker), env, processes, {"localhost": slots}, meeting, local.PROGRAM)


def plan_elsewhere(loaded: LoadedConfig, machine: Machine, chosen: Machines, worker: Sequence[str], *, ask: bool) -> Launch:
    """Through pdsh, an MPI or SLURM. SLURM needs no ssh, and its processes find the first machine themselves."""
    launcher = loaded.config.launcher
    multinode = Multinode(launcher, chosen.slots, hostfile=chosen.hostfile, machine=machine)
    if ask and not multinode.program_exists():
        raise ConfigError([missing_program(launcher)])
    first = next(iter(chosen.slots))
    if launcher.program == "slurm":
        address = launcher.master_addr
    else:
        address = reach(launcher, chosen) if ask else first_address(launcher, chosen) or first
    meeting = Meeting(address, launcher.master_port)
    shared = {"MASTER_ADDR": address} if launcher.program == "slurm" and address is not None else {}
    if launcher.threads_per_process is not None:
        shared["OMP_NUM_THREADS"] = str(launcher.threads_per_process)
    here = _environment(loaded, machine, max(map(len, chosen.slots.values())))
    command = multinode.command(worker, meeting, here, shared)
    return Launch(command.argv, command.env, chosen.processes, chosen.slots, meeting, launcher.program, command.stop)


def plan_torchrun(loaded: LoadedConfig, machine: Machine, chosen: Machines, worker: Sequence[str]) -> Launch:
    """Through torchrun on this machine alone. The other machines of the hostfile are given the same command."""
    launcher = loaded.config.launcher
    node = this_node(chosen, launcher.master_addr)
    meeting = Meeting(node.address, launcher.master_port)
    env = {**_environment(loaded, machine, len(node.slots)), **devices(node.slots, machine.gpus)}
    return Launch(torchrun_command(node, meeting.port, worker), env, len(node.slots), chosen.slots, meeting, "torchrun")


def here_alone(processes: int) -> Machines:
    return Machines({"localhost": range(processes)}, None)


def missing_program(launcher: LauncherConfig) -> str:
    return f"'launcher' = '{launcher.program}': the program is not installed on this machine; install it, or choose another launcher"


def runs_elsewhere(launcher: LauncherConfig, chosen: Machines | None) -> bool:
    """Whether processes run on other machines than this one, whose devices are not known here."""
    return launcher.force_multi or (chosen is not None and chosen.hostfile is not None and not chosen.only_this_one)


def machine_notices(loaded: LoadedConfig, machine: Machine | None = None) -> list[str]:
    """Sentences on what was asked for about machines and is not done; with the machine, on what the hostfile does not have as well.

    Raises ConfigError as worker_count does, and for what the way to start processes (`launcher`) does not take.
    """
    launcher = loaded.config.launcher
    chosen = machines(launcher, machine) if machine is not None else None
    scheduler = [key for key in ("comment", "account") if getattr(launcher, key) is not None and launcher.program != "slurm"]
    notices = [f"'{key}' is for SLURM's scheduler, and 'launcher' = '{launcher.program}' has none" for key in scheduler]
    if machine is not None and chosen is not None and chosen.hostfile is not None:
        notices += chosen.notices
        if launcher.program != "torchrun" and runs_elsewhere(launcher, chosen):
            multinode = Multinode(launcher, chosen.slots, hostfile=chosen.hostfile, machine=machine)
            multinode.command(["script.py"], Meeting(next(iter(chosen.slots)), launcher.master_port), os.environ, {})
            notices += [] if multinode.program_exists() else [missing_program(launcher)]
        return notices
    for name, file in (("'hostfile'", launcher.hostfile), ("DLTS_HOSTFILE", os.environ.get("DLTS_HOSTFILE"))):
        if file:
            return notices if Path(file).is_file() else [*notices, f"{name} = '{file}': no such file, so only this machine is used"]
    if launcher.program == "pdsh" or find_hostfile(launcher) is not None or launcher.force_multi:
        return notices
    alone = f"'launcher' = '{launcher.program}': there is no hostfile, so only this machine is used; give a hostfile, or write force_multi: true"
    return [*notices, alone]


def _environment(loaded: LoadedConfig, machine: Machine, processes: int) -> dict[str, str]:
    """This process's environment with the accelerator and the share of the cores filled in; what the user has set stays."""
    threads = loaded.config.launcher.threads_per_process
    defaults = {"OMP_NUM_THREADS": str(max(1, machine.cores // processes))}
    if not machine.gpus:
        defaults["DS_ACCELERATOR"] = "cpu"
    chosen: Mapping[str, str] = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**defaults, **os.environ, **chosen}
