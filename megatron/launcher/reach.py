"""Before a run on several machines: can each be reached, is the program that starts processes there installed, and at which address do they meet?"""

from __future__ import annotations

import shlex
import subprocess
import warnings
from collections.abc import Sequence

from megatron.config.launcher import LauncherConfig
from megatron.config.section import ConfigError
from megatron.launcher.machines import Machines, deepspeed_runner, silenced
from megatron.launcher.processes import Machine

SSH = ("ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15")
AT_ONCE = 64
HINT = "set up ssh without a password to the host, correct its name in the hostfile, or set no_ssh_check: true to start without this check"


class LaunchError(RuntimeError):
    """A run could not be started on the machines that were asked for."""


def check_program(options: Sequence[str], chosen: Machines, machine: Machine) -> str | None:
    """Raises ConfigError when DeepSpeed's way to start processes (`launcher`) does not take what was asked for.

    Returns a sentence when its program is not installed on this machine, None when it is. `options`: those of deepspeed.launcher.runner.
    """
    runner = deepspeed_runner(machine)
    arguments = runner.parse_args([*options, "script.py"])
    name = arguments.launcher.lower()
    kind = runner.LAUNCHER_CLASSES[name]
    world, pool = runner.encode_world_info(dict(chosen.slots)), {host: len(slots) for host, slots in chosen.slots.items()}
    try:
        with silenced():
            kind.validate_active_resources(chosen.slots)
            backend = kind(arguments, world) if name == runner.PDSH_LAUNCHER else kind(arguments, world, pool)
    except ValueError as error:
        raise ConfigError([f"'launcher' = '{name}': {error}"]) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is in the sentence
        there = bool(backend.backend_exists())
    return None if there else f"'launcher' = '{name}': the program is not installed on this machine; install it, or choose another launcher"


def reach(launcher: LauncherConfig, chosen: Machines) -> str:
    """The address at which the processes meet: `master_addr`, else the first that the first host names. Raises LaunchError for a host without answer.

    Every host is asked at once (DeepSpeed asks the first alone); with no_ssh_check only what is needed for the address.
    """
    hosts = list(chosen.slots)
    if not launcher.no_ssh_check:
        for begin in range(0, len(hosts), AT_ONCE):
            ask(hosts[begin : begin + AT_ONCE], "hostname", chosen.hostfile)
    if launcher.master_addr is not None:
        return launcher.master_addr
    addresses = ask(hosts[:1], "hostname -I", chosen.hostfile)[0].split()
    if not addresses:
        raise LaunchError(f"{chosen.hostfile}: {hosts[0]} gives no address (the output of `hostname -I` is empty); set master_addr to its address.")
    return addresses[0]


def ask(hosts: Sequence[str], command: str, hostfile: str | None) -> list[str]:
    """What the command says on each host. Raises LaunchError that names every host without answer."""
    lines = [[*SSH, host, *shlex.split(command)] for host in hosts]
    try:
        started = [subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines]
    except FileNotFoundError:
        raise LaunchError("ssh is not installed on this machine (it is not on the PATH), but it is needed to reach other machines.") from None
    answers = [process.communicate() for process in started]
    failed = []
    for host, line, process, (_, error) in zip(hosts, lines, started, answers, strict=True):
        if process.returncode:
            said = f" ({error.strip().splitlines()[-1]})" if error.strip() else ""
            failed.append(f"{host} cannot be reached: `{shlex.join(line)}` ended with status {process.returncode}{said}")
    if failed:
        raise LaunchError("\n".join([f"{hostfile}: {failed[0]}", *failed[1:], f"For each: {HINT}."]))
    return [answer for answer, _ in answers]
