"""Before a run on several machines: can each be reached, and at which address do they meet?"""

from __future__ import annotations

import ipaddress
import shlex
import subprocess
from collections.abc import Sequence

from megatron.config.launcher import LauncherConfig
from megatron.launcher.machines import Machines, is_this_machine

SSH = ("ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15")
AT_ONCE = 64
HINT = "set up ssh without a password to the host, correct its name in the hostfile, or set no_ssh_check: true to start without this check"


class LaunchError(RuntimeError):
    """A run could not be started on the machines that were asked for."""


def reach(launcher: LauncherConfig, chosen: Machines) -> str:
    """The address at which the processes meet (`first_address`). Raises LaunchError for a host without answer.

    Every other machine is asked at once (DeepSpeed asks the first alone); with no_ssh_check only what is needed for the address.
    """
    hosts = [host for host in chosen.slots if not is_this_machine(host)]
    if not launcher.no_ssh_check:
        for begin in range(0, len(hosts), AT_ONCE):
            ask(hosts[begin : begin + AT_ONCE], "hostname", chosen.hostfile)
    if (known := first_address(launcher, chosen)) is not None:
        return known
    first = next(iter(chosen.slots))
    addresses = ask([first], "hostname -I", chosen.hostfile)[0].split()
    if not addresses:
        raise LaunchError(f"{chosen.hostfile}: {first} gives no address (the output of `hostname -I` is empty); set master_addr to its address.")
    return addresses[0]


def first_address(launcher: LauncherConfig, chosen: Machines) -> str | None:
    """`master_addr`, else the first host if it is an address. None: the first host has to be asked."""
    if launcher.master_addr is not None:
        return launcher.master_addr
    first = next(iter(chosen.slots))
    try:
        return str(ipaddress.ip_address(first))
    except ValueError:
        return None


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
