"""The command that starts processes on several machines, made by DeepSpeed's classes for pdsh, MPI and SLURM.

DeepSpeed's own runner is not used: its status is 0 when a signal has ended the command, and it does not show the command without running it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron.config.launcher import LauncherConfig
from megatron.config.section import ConfigError
from megatron.launcher.machines import deepspeed_runner, silenced
from megatron.launcher.processes import Machine

PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mvapich": "mpiname", "mpich": "mpirun", "impi": "mpirun", "slurm": "sinfo"}
"""The program by which each way to start processes is recognised."""
WITHOUT_PLACE = ("openmpi", "mvapich")
"""Ways to start processes for which DeepSpeed does not say where the processes meet."""
PASSED_ON = ("DS_ACCELERATOR", "GLOO_", "NCCL_", "OMP_", "TORCH_")
"""Variables that the other machines get too, by the beginnings of their names, besides DeepSpeed's own list (PYTHON, UCX, MV2, MLFLOW)."""
FOR_SLURM = ("--kill-on-bad-exit=1",)
"""One task that dies takes the others down."""
HELPER = "launcher_helper.py"


@dataclass(frozen=True)
class Meeting:
    """Where the processes meet. address None: not known, and the processes find it."""

    address: str | None
    port: int


@dataclass(frozen=True)
class Command:
    """A command, its environment, and the command that ends what it has started (empty: a signal to it is enough)."""

    argv: tuple[str, ...]
    env: dict[str, str]
    stop: tuple[str, ...] = ()


class Multinode:
    """DeepSpeed's class for the key `launcher`, with the slots of each host and the words of the workers' command."""

    def __init__(self, launcher: LauncherConfig, slots: Mapping[str, Sequence[int]], *, hostfile: str | None, machine: Machine) -> None:
        self.name = launcher.program
        self.slots = {host: list(numbers) for host, numbers in slots.items()}
        self.runner: ModuleType = deepspeed_runner(machine)
        # Without a hostfile, the number of processes is the whole of what is asked for; an MPI would refuse it as a limit to its hosts.
        self.launcher = launcher if hostfile is not None or self.name == "slurm" else launcher.model_copy(update={"num_gpus": None})
        self.hostfile = hostfile

    def program_exists(self) -> bool:
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")  # what it warns of is in the sentence
            try:
                return bool(self._backend(Meeting("localhost", 1), ["script.py"]).backend_exists())
            except OSError:  # MVAPICH's program is there but cannot be run
                return False

    def command(self, worker: Sequence[str], meeting: Meeting, environment: Mapping[str, str], shared: Mapping[str, str]) -> Command:
        """`worker`: the words of a worker, its script first. `shared`: variables that every process gets. Raises ConfigError for what cannot be
        asked of this way to start processes."""
        env = {**environment, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, [environment.get("PYTHONPATH")])])}
        try:
            with silenced(), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints Intel MPI's command
                backend = self._backend(meeting, worker)
                self._export(backend, env, meeting, shared)
                made = backend.get_cmd(env, self.slots)
        except ValueError as error:
            raise self._refused(error) from None
        if self.name != "pdsh":
            return Command(tuple(without_helper(made)), env)
        argv, _, env = made
        return Command(tuple(argv), env, self._stop(meeting))

    def _refused(self, error: ValueError) -> ConfigError:
        return ConfigError([f"'launcher' = '{self.name}': {error}"])

    def _backend(self, meeting: Meeting, worker: Sequence[str]) -> Any:
        arguments = self.runner.parse_args([*runner_options(self.launcher, self.hostfile, meeting, FOR_SLURM), *worker])
        kind = self.runner.LAUNCHER_CLASSES[self.name]
        pool = {host: len(numbers) for host, numbers in self.slots.items()}
        try:
            kind.validate_active_resources(self.slots)
            return kind(arguments, self._world()) if self.name == "pdsh" else kind(arguments, self._world(), pool)
        except ValueError as error:
            raise self._refused(error) from None

    def _world(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(self.slots).encode()).decode()

    def _export(self, backend: Any, env: Mapping[str, str], meeting: Meeting, shared: Mapping[str, str]) -> None:
        """The variables that the processes get, as DeepSpeed's runner chooses them: by name, and from .deepspeed_env; and ours."""
        runner = self.runner
        left_out = {name for key, names in runner.EXCLUDE_ENVS.items() if key in env for name in names}
        begins = (*runner.EXPORT_ENVS, *runner.get_accelerator().export_envs())
        variables = {name: value for name, value in env.items() if name.startswith(begins) and name not in left_out}
        variables |= {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | dict(shared)
        if self.name in WITHOUT_PLACE and meeting.address is not None:
            variables |= {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
        for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
            file = Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME)
            if file.is_file():
                lines = [line for line in file.read_text().splitlines() if line.strip()]
                wrong = next((line for line in lines if "=" not in line), None)
                if wrong is not None:
                    raise ConfigError([f"{file}: {wrong!r} is no variable; write NAME=VALUE on each line"])
                variables |= dict(line.split("=", maxsplit=1) for line in lines)
        for name, value in variables.items():
            backend.add_export(name, value)

    def _stop(self, meeting: Meeting) -> tuple[str, ...]:
        """Tells the launchers on the machines of this run, and of no other run, to end their processes."""
        here = re.escape(sys.executable).replace("\\-", "-")
        pattern = f"^{here} -u -m deepspeed.launcher.launch --world_info={self._world()} .*--master_port={meeting.port} "
        return ("pdsh", "-S", "-w", ",".join(self.slots), f"pkill -TERM -f {shlex.quote(pattern)}")


def runner_options(launcher: LauncherConfig, hostfile: str | None, meeting: Meeting, scheduler: Sequence[str] = ()) -> list[str]:
    """The launcher section as options of deepspeed.launcher.runner. `scheduler`: more options for SLURM."""
    named = {
        "--hostfile": hostfile,
        "--include": launcher.include,
        "--exclude": launcher.exclude,
        "--num_nodes": launcher.num_nodes if launcher.num_nodes >= 0 else None,
        "--num_gpus": launcher.num_gpus,
        "--master_port": meeting.port,
        "--master_addr": meeting.address,
        "--launcher": launcher.program,
    }
    options = [word for option, value in named.items() if value is not None for word in (option, str(value))]
    if launcher.program == "slurm":
        named = {"--comment": launcher.comment, "--account": launcher.account}
        scheduler = [*(f"{option}={value}" for option, value in named.items() if value is not None), *scheduler]
        options += [f"--launcher_args={shlex.join(scheduler)}"] if scheduler else []
    switches = {"--force_multi": launcher.force_multi, "--no_ssh_check": launcher.no_ssh_check}
    return options + [option for option, chosen in switches.items() if chosen]


def without_helper(argv: Sequence[str]) -> list[str]:
    """MPICH's command without DeepSpeed's script that names the ranks: its status is 0 when the worker has failed, and workers read MPICH's names."""
    place = next((place for place, word in enumerate(argv) if word.endswith(HELPER)), None)
    return list(argv) if place is None else [*argv[:place], *argv[place + 3 :]]
