"""Which machines and slots a run takes, read by DeepSpeed's own parsers; its refusals become sentences with the file and line.

DeepSpeed's runner is imported only where a hostfile, a filter or several machines are asked for: one machine alone needs nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron.config.launcher import LauncherConfig
from megatron.config.section import ConfigError
from megatron.launcher.processes import Machine

DEFAULT_HOSTFILE = "/job/hostfile"  # where DeepSpeed looks when nothing is said
LINE = "write one line for each machine, such as `worker-1 slots=8`"
FILTER = "DeepSpeed's syntax is HOST[:SLOT,SLOT ...][@HOST ...], such as worker-1@worker-2:0,2"


@dataclass(frozen=True)
class Machines:
    """slots: the slots that are used of each host, in the order of the ranks. hostfile: the file that names the hosts; None: this machine alone."""

    slots: Mapping[str, Sequence[int]]
    hostfile: str | None
    notices: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return sum(map(len, self.slots.values()))

    @property
    def only_this_one(self) -> bool:
        return len(self.slots) == 1 and is_this_machine(next(iter(self.slots)))


def find_hostfile(launcher: LauncherConfig) -> str | None:
    """The file that names the machines, or None where there is none: this machine only. Raises ConfigError for a folder."""
    for source, name in (("'hostfile'", launcher.hostfile), ("DLTS_HOSTFILE", os.environ.get("DLTS_HOSTFILE")), ("", DEFAULT_HOSTFILE)):
        if name:
            if source and Path(name).is_dir():
                raise ConfigError([f"{source} = '{name}': is a folder; name the file in it that lists the machines"])
            return name if Path(name).is_file() else None
    return None


def machines(launcher: LauncherConfig, machine: Machine) -> Machines | None:
    """The machines and slots that would be used; None where nothing but this machine's own number of processes is asked for.

    Raises ConfigError with what DeepSpeed refuses, and where nothing would be started.
    """
    hostfile = find_hostfile(launcher)
    filters = [key for key in ("include", "exclude") if getattr(launcher, key)]
    counts = [key for key in ("num_nodes", "num_gpus") if getattr(launcher, key) is not None and getattr(launcher, key) >= 0]
    if hostfile is None and launcher.num_nodes > 1:
        raise ConfigError([f"'num_nodes' = {launcher.num_nodes}: there is no hostfile with other machines; set hostfile, or remove num_nodes"])
    if filters and counts:
        raise ConfigError([f"'{filters[0]}' and '{counts[0]}': DeepSpeed takes only one of them; remove the other"])
    if hostfile is None and not filters:
        return None
    runner = deepspeed_runner(machine)
    pool = read_hostfile(runner, hostfile) if hostfile is not None else {"localhost": local_slots(runner, machine)}
    chosen = filtered(runner, pool, launcher, hostfile)
    trimmed = runner.apply_num_nodes_and_gpus(chosen, launcher.num_nodes, launcher.num_gpus or -1)
    if not any(trimmed.values()):
        raise ConfigError([f"'{(filters or ['hostfile'])[0]}': no slot is left on any machine, so no process would start; change it"])
    return Machines(trimmed, hostfile, tuple(count_notices(launcher, chosen, hostfile)))


def deepspeed_runner(machine: Machine) -> ModuleType:
    """The module with DeepSpeed's parsers (seconds to import), told that there are no GPUs where there are none."""
    if not machine.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with silenced():
        return importlib.import_module("deepspeed.launcher.runner")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without DeepSpeed's lines on the console: what it refuses is said in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def read_hostfile(runner: ModuleType, hostfile: str) -> dict[str, int]:
    """Host -> slots, by DeepSpeed. Raises ConfigError with the line that it refuses."""
    try:
        lines = Path(hostfile).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError([f"'hostfile' = '{hostfile}': is not UTF-8 text (byte {error.start:,}); {LINE}"]) from None
    with silenced():
        try:
            pool: dict[str, int] = runner._parse_hostfile(lines)
        except ValueError as error:
            number = refused_line(runner, lines)
            place = hostfile if number is None else f"{hostfile}:{number}"
            said = str(error).removesuffix(".").removesuffix(", unable to proceed with launching")
            raise ConfigError([f"{place}: {said}; {LINE}, each machine once"]) from None
    empty = next((host for host, slots in pool.items() if not slots), None)
    if empty is not None:
        number = next(number for number, line in enumerate(lines, start=1) if line.split()[:1] == [empty])
        raise ConfigError([f"{hostfile}:{number}: {empty} has slots=0, so no process would start there; write 1 or more, or remove the line"])
    return pool


def refused_line(runner: ModuleType, lines: Sequence[str]) -> int | None:
    """The number of the first line with which DeepSpeed refuses the beginning of the file; None: it is refused for what it lacks."""
    hosts = 0
    for number, line in enumerate(lines, start=1):
        try:
            hosts = len(runner._parse_hostfile(lines[:number]))
        except ValueError:
            if hosts or (line.strip() and not line.strip().startswith("#")):
                return number
    return None


def filtered(runner: ModuleType, pool: Mapping[str, int], launcher: LauncherConfig, hostfile: str | None) -> dict[str, list[int]]:
    """What include or exclude leave of the hosts, by DeepSpeed. Raises ConfigError."""
    key = "include" if launcher.include else "exclude"
    value = getattr(launcher, key) or ""
    try:
        with silenced():
            chosen: dict[str, list[int]] = runner.parse_inclusion_exclusion(pool, launcher.include or "", launcher.exclude or "")
    except ValueError as error:
        said = str(error)
        if said.startswith("Hostname"):
            there = ", ".join(pool)
            said = said.replace("not found in hostfile", f"is not in {hostfile}" if hostfile else "is not this machine, and there is no hostfile")
            raise ConfigError([f"'{key}' = '{value}': {said}; there is: {there}"]) from None
        if said.startswith("No slot"):
            there = ", ".join(f"{host} 0 to {slots - 1}" for host, slots in pool.items())
            raise ConfigError([f"'{key}' = '{value}': {said}; there are: {there}"]) from None
        raise ConfigError([f"'{key}' = '{value}': cannot be read ({said}); {FILTER}"]) from None
    return chosen


def count_notices(launcher: LauncherConfig, chosen: Mapping[str, Sequence[int]], hostfile: str | None) -> Iterator[str]:
    """What DeepSpeed does without a word about counts that the hosts do not have."""
    if launcher.num_nodes > len(chosen):
        yield f"'num_nodes' = {launcher.num_nodes}: {hostfile} names {len(chosen)} machine(s), and all of them are used"
    small = [f"{host} ({len(slots)})" for host, slots in chosen.items() if launcher.num_gpus is not None and launcher.num_gpus > len(slots)]
    if small:
        more = f"'num_gpus' = {launcher.num_gpus}: more than the slots of {', '.join(small)} in {hostfile}"
        yield f"{more}; DeepSpeed starts {launcher.num_gpus} on each of them nevertheless"


def local_slots(runner: ModuleType, machine: Machine) -> int:
    """The slots that DeepSpeed counts on this machine when no hostfile says how many there are."""
    return machine.gpus or int(runner.get_accelerator().device_count())


def is_this_machine(host: str) -> bool:
    """Whether a name, or an address, is this machine's."""
    name = socket.gethostname()
    if host in {"localhost", name, name.split(".")[0], socket.getfqdn()}:
        return True
    try:
        family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):  # no address, or another machine's
        return False
    return True
