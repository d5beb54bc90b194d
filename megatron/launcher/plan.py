"""What to start: how many processes, on which machines, with which command and environment. Starts nothing itself."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.loader import LoadedConfig
from megatron.config.section import ConfigError
from megatron.config.transport import encode
from megatron.launcher.processes import Machine, free_port

_DEFAULT_HOSTFILE = "/job/hostfile"  # where DeepSpeed looks when nothing is said


@dataclass(frozen=True)
class Launch:
    """A command and its environment; `replaces` says that it takes the place of the calling process, `processes` how many workers it starts here."""

    argv: tuple[str, ...]
    env: dict[str, str]
    processes: int
    replaces: bool


def worker_count(loaded: LoadedConfig, machine: Machine) -> int:
    """Processes in all: as asked for, else one per GPU, else one. Raises ConfigError for more processes than GPUs where there are GPUs."""
    launcher = loaded.config.launcher
    if launcher.num_gpus is not None and 0 < machine.gpus < launcher.num_gpus:
        raise ConfigError([f"'num_gpus' = {launcher.num_gpus}: this machine has {machine.gpus} GPU(s) to use"])
    here = launcher.num_gpus or max(1, machine.gpus)
    if launcher.global_num_gpus is None:
        return sum(_slots(loaded, here))
    if launcher.num_gpus is not None and _hostfile(loaded) is None and launcher.num_gpus != launcher.global_num_gpus:
        raise ConfigError([f"'global_num_gpus' = {launcher.global_num_gpus}: num_gpus is {launcher.num_gpus}; on one machine give only one of them"])
    return launcher.global_num_gpus


def plan_launch(script: Path, loaded: LoadedConfig, machine: Machine) -> Launch:
    """The command that starts the script's workers. Raises ConfigError when the machine has too few GPUs."""
    processes = worker_count(loaded, machine)
    worker_arguments = [str(script), "--megatron_config", encode(loaded)]
    several_machines = _hostfile(loaded) is not None or loaded.config.launcher.force_multi
    env = _environment(loaded, machine, 1 if several_machines else processes)
    if several_machines or _filtered(loaded):
        return Launch((sys.executable, "-m", "deepspeed.launcher.runner", *runner_options(loaded), *worker_arguments), env, processes, False)
    if processes == 1:
        return Launch((sys.executable, *worker_arguments), env, 1, True)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": machine.devices(processes)}).encode()).decode()
    port = free_port(loaded.config.launcher.master_port)
    local = ["--world_info", world, "--master_addr", "127.0.0.1", "--master_port", str(port), "--log_level", "critical"]
    return Launch((sys.executable, "-m", "deepspeed.launcher.launch", *local, *worker_arguments), env, processes, False)


def machine_notices(loaded: LoadedConfig) -> list[str]:
    """Sentences on what was asked for about machines and is not done."""
    launcher = loaded.config.launcher
    for name, file in (("'hostfile'", launcher.hostfile), ("DLTS_HOSTFILE", os.environ.get("DLTS_HOSTFILE"))):
        if file:
            return [] if Path(file).is_file() else [f"{name} = '{file}': no such file; this machine alone is used"]
    asked = "slurm" if launcher.deepspeed_slurm else launcher.launcher
    if asked == "pdsh" or _hostfile(loaded) is not None or launcher.force_multi:
        return []
    return [f"'launcher' = '{asked}': there is no hostfile, so this machine alone is used; give one, or force_multi: true"]


def _hostfile(loaded: LoadedConfig) -> str | None:
    """The file that names the machines, or None when there is none: this machine only."""
    name = loaded.config.launcher.hostfile or os.environ.get("DLTS_HOSTFILE") or _DEFAULT_HOSTFILE
    return name if Path(name).is_file() else None


def _slots(loaded: LoadedConfig, here: int) -> list[int]:
    """Processes on each machine of the hostfile (`host slots=N` lines), or on this one."""
    hostfile = _hostfile(loaded)
    if hostfile is None:
        return [here]
    lines = [line.split("#")[0].split() for line in Path(hostfile).read_text().splitlines()]
    slots = [int(word.removeprefix("slots=")) for line in lines for word in line[1:] if word.startswith("slots=") and word[6:].isdigit()]
    if not slots:
        raise ConfigError([f"'hostfile' = '{hostfile}': has no line such as `worker-1 slots=8`"])
    nodes = loaded.config.launcher.num_nodes
    return [loaded.config.launcher.num_gpus or count for count in (slots if nodes < 0 else slots[:nodes])]


def _filtered(loaded: LoadedConfig) -> bool:
    return loaded.config.launcher.include is not None or loaded.config.launcher.exclude is not None


def runner_options(loaded: LoadedConfig) -> list[str]:
    """The launcher section as options of deepspeed.launcher.runner."""
    launcher = loaded.config.launcher
    named = {
        "--hostfile": _hostfile(loaded),
        "--include": launcher.include,
        "--exclude": launcher.exclude,
        "--num_nodes": launcher.num_nodes if launcher.num_nodes >= 0 else None,
        "--num_gpus": launcher.num_gpus,
        "--master_port": launcher.master_port,
        "--master_addr": launcher.master_addr,
        "--launcher": "slurm" if launcher.deepspeed_slurm else launcher.launcher,
    }
    options = [word for option, value in named.items() if value is not None for word in (option, str(value))]
    scheduler = [f"--{name}={value}" for name, value in (("comment", launcher.comment), ("account", launcher.account)) if value is not None]
    if scheduler:
        options.append(f"--launcher_args={' '.join(scheduler)}")
    switches = {"--force_multi": launcher.force_multi, "--no_ssh_check": launcher.no_ssh_check}
    return options + [option for option, chosen in switches.items() if chosen]


def _environment(loaded: LoadedConfig, machine: Machine, processes: int) -> dict[str, str]:
    """This process's environment with the accelerator and the share of the cores filled in; what the user has set stays."""
    threads = loaded.config.launcher.threads_per_process
    defaults = {"OMP_NUM_THREADS": str(max(1, machine.cores // processes))}
    if not machine.gpus:
        defaults["DS_ACCELERATOR"] = "cpu"
    chosen: Mapping[str, str] = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**defaults, **os.environ, **chosen}
