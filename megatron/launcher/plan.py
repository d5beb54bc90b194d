"""What to start: how many processes, on which machines, with which command and environment. Starts nothing itself."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.launcher import LauncherConfig
from megatron.config.loader import LoadedConfig
from megatron.config.section import ConfigError
from megatron.config.transport import encode
from megatron.launcher.machines import Machines, find_hostfile, machines
from megatron.launcher.processes import Machine, free_port
from megatron.launcher.reach import check_program, reach


@dataclass(frozen=True)
class Launch:
    """A command and its environment; `replaces` says that it takes the place of the calling process, `processes` how many workers it starts here."""

    argv: tuple[str, ...]
    env: dict[str, str]
    processes: int
    replaces: bool


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


def plan_launch(script: Path, loaded: LoadedConfig, machine: Machine) -> Launch:
    """The command that starts the script's workers. Raises ConfigError as worker_count does, and LaunchError for a machine that cannot be reached."""
    launcher = loaded.config.launcher
    chosen = machines(launcher, machine)
    processes = count_of(launcher, machine, chosen)
    worker_arguments = [str(script), "--megatron_config", encode(loaded)]
    remote = runs_elsewhere(launcher, chosen)
    if remote or (chosen is not None and chosen.hostfile is None):
        here = 1 if chosen is None else max(map(len, chosen.slots.values()))
        options = runner_options(loaded)
        if remote and chosen is not None:
            address = reach(launcher, chosen)
            missing = check_program(options, chosen, machine) if starts_elsewhere(launcher, chosen) else None
            if missing is not None:
                raise ConfigError([missing])
            options = runner_options(loaded, master_addr=address)
        argv = (sys.executable, "-m", "deepspeed.launcher.runner", *options, *worker_arguments)
        return Launch(argv, _environment(loaded, machine, here), processes, False)
    env = _environment(loaded, machine, processes)
    if processes == 1 and chosen is None:
        return Launch((sys.executable, *worker_arguments), env, 1, True)
    slots = machine.devices(processes) if chosen is None else next(iter(chosen.slots.values()))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(slots)}).encode()).decode()
    port = free_port(launcher.master_port)
    local = ["--world_info", world, "--master_addr", "127.0.0.1", "--master_port", str(port), "--log_level", "critical"]
    return Launch((sys.executable, "-m", "deepspeed.launcher.launch", *local, *worker_arguments), env, processes, False)


def starts_elsewhere(launcher: LauncherConfig, chosen: Machines) -> bool:
    """Whether DeepSpeed starts processes through `launcher`; one host alone gets them without."""
    return launcher.force_multi or len(chosen.slots) > 1


def runs_elsewhere(launcher: LauncherConfig, chosen: Machines | None) -> bool:
    """Whether processes run on other machines than this one, whose devices are not known here."""
    return launcher.force_multi or (chosen is not None and chosen.hostfile is not None and not chosen.only_this_one)


def machine_notices(loaded: LoadedConfig, machine: Machine | None = None) -> list[str]:
    """Sentences on what was asked for about machines and is not done; with the machine, on what the hostfile does not have as well.

    Raises ConfigError as worker_count does, and for what DeepSpeed's way to start processes (`launcher`) does not take.
    """
    launcher = loaded.config.launcher
    chosen = machines(launcher, machine) if machine is not None else None
    if machine is not None and chosen is not None and chosen.hostfile is not None:
        missing = check_program(runner_options(loaded), chosen, machine) if starts_elsewhere(launcher, chosen) else None
        return [*chosen.notices, *([] if missing is None else [missing])]
    for name, file in (("'hostfile'", launcher.hostfile), ("DLTS_HOSTFILE", os.environ.get("DLTS_HOSTFILE"))):
        if file:
            return [] if Path(file).is_file() else [f"{name} = '{file}': no such file, so only this machine is used"]
    asked = "slurm" if launcher.deepspeed_slurm else launcher.launcher
    if asked == "pdsh" or find_hostfile(launcher) is not None or launcher.force_multi:
        return []
    return [f"'launcher' = '{asked}': there is no hostfile, so only this machine is used; give a hostfile, or write force_multi: true"]


def runner_options(loaded: LoadedConfig, *, master_addr: str | None = None) -> list[str]:
    """The launcher section as options of deepspeed.launcher.runner. `master_addr`: found by asking the machines, so that DeepSpeed need not."""
    launcher = loaded.config.launcher
    named = {
        "--hostfile": find_hostfile(launcher),
        "--include": launcher.include,
        "--exclude": launcher.exclude,
        "--num_nodes": launcher.num_nodes if launcher.num_nodes >= 0 else None,
        "--num_gpus": launcher.num_gpus,
        "--master_port": launcher.master_port,
        "--master_addr": master_addr or launcher.master_addr,
        "--launcher": "slurm" if launcher.deepspeed_slurm else launcher.launcher,
    }
    options = [word for option, value in named.items() if value is not None for word in (option, str(value))]
    scheduler = [f"--{name}={value}" for name, value in (("comment", launcher.comment), ("account", launcher.account)) if value is not None]
    if scheduler:
        options.append(f"--launcher_args={' '.join(scheduler)}")
    switches = {"--force_multi": launcher.force_multi, "--no_ssh_check": launcher.no_ssh_check or master_addr is not None}
    return options + [option for option, chosen in switches.items() if chosen]


def _environment(loaded: LoadedConfig, machine: Machine, processes: int) -> dict[str, str]:
    """This process's environment with the accelerator and the share of the cores filled in; what the user has set stays."""
    threads = loaded.config.launcher.threads_per_process
    defaults = {"OMP_NUM_THREADS": str(max(1, machine.cores // processes))}
    if not machine.gpus:
        defaults["DS_ACCELERATOR"] = "cpu"
    chosen: Mapping[str, str] = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**defaults, **os.environ, **chosen}
