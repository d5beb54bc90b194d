"""How much memory this machine gives to the process that asks: what is built in, less what a container or a limit of the shell takes away."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30


class NotEnoughMemory(RuntimeError):
    """What is asked for cannot fit the memory; the message says how much it needs, how much there is, and what to do."""


class Room(NamedTuple):
    """Bytes. total: all that could ever be had, swap included; free: now, without swap."""

    total: int
    free: int


def machine_memory(root: Path = Path("/")) -> Room | None:
    """Of this process on the CPU. None where the system does not say (elsewhere than on Linux)."""
    meminfo = _numbers(root / "proc/meminfo")
    if "MemTotal" not in meminfo or "MemAvailable" not in meminfo:
        return None
    total, free = 1024 * meminfo["MemTotal"], 1024 * meminfo["MemAvailable"]
    for limit, used in _container_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    total += 1024 * meminfo.get("SwapTotal", 0)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return Room(total, free) if address_space == resource.RLIM_INFINITY else Room(min(total, address_space), min(free, address_space))


def check_fits(needed: int, room: Room | None, *, what: str, where: str, advice: str) -> str | None:
    """Raises NotEnoughMemory when `needed` bytes are more than there ever are. A sentence for the log when they are only more than is free now.

    `room` None: not known, nothing is checked. `what` needs, `where` has: "Training needs at least 20.0 GiB of memory, but this machine has ...".
    """
    if room is None or needed <= room.free:
        return None
    numbers = (
        f"{what} needs at least {needed / GIB:.1f} GiB of memory, but {where} has {room.total / GIB:.1f} GiB, {room.free / GIB:.1f} GiB of it free"
    )
    if needed > room.total:
        raise NotEnoughMemory(f"{numbers}. {advice}")
    return f"{numbers} now. The process may end for lack of memory. {advice}"


def _container_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(bytes allowed, bytes used without what the system keeps of files) of each control group that this process is in, version 2 and 1."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(groups, path, ("memory.max", "memory.current", "file"))
        elif "memory" in controllers.split(","):
            yield from _limits(groups / "memory", path, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"))


def _limits(top: Path, path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    """Of the group at `path` below `top` and of all above it; inside a container the path may be of the machine outside, and `top` is the group."""
    limit_file, usage_file, cache_key = names
    group = top / path.strip("/")
    for folder in [group, *(parent for parent in group.parents if parent == top or top in parent.parents)]:
        try:
            limit, used = int((folder / limit_file).read_text()), int((folder / usage_file).read_text())
        except (OSError, ValueError):
            continue  # no such group in here, or `max`: no limit
        yield limit, max(0, used - _numbers(folder / "memory.stat").get(cache_key, 0))


def _numbers(file: Path) -> dict[str, int]:
    """`name: 12 kB` or `name 12`, line by line; empty where there is no such file."""
    try:
        lines = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
