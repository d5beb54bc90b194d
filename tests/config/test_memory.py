"""What a machine has, from the files in which Linux says it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron.config.memory import GIB, NotEnoughMemory, Room, check_fits, machine_memory

MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {60 * GIB // 1024} kB\nSwapTotal: {2 * GIB // 1024} kB\n"
V2 = {"memory.max": str(16 * GIB), "memory.current": str(15 * GIB), "memory.stat": f"anon 1\nfile {10 * GIB}\n"}
V1 = {"memory.limit_in_bytes": str(8 * GIB), "memory.usage_in_bytes": str(6 * GIB), "memory.stat": f"total_cache {GIB}\n"}
NO_LIMIT_V1 = {**V1, "memory.limit_in_bytes": "9223372036854771712"}


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("groups", "folder", "files", "total", "free"),
    [
        ("0::/", "", {}, 66, 60),
        ("0::/", "", V2, 18, 11),
        ("0::/user/job", "user", V2, 18, 11),
        ("0::/outside/the/container", "", V2, 18, 11),
        ("0::/", "", {**V2, "memory.max": "max"}, 66, 60),
        ("4:cpu,memory:/job\n0::/", "memory/job", V1, 10, 3),
        ("4:memory:/job", "memory/job", NO_LIMIT_V1, 66, 60),
    ],
)
def test_limits_of_containers(tmp_path: Path, groups: str, folder: str, files: Mapping[str, str], total: int, free: int) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups + "\n"})
    write(tmp_path / "sys/fs/cgroup" / folder, files)
    assert machine_memory(tmp_path) == Room(total * GIB, free * GIB)


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert machine_memory(tmp_path) is None
    assert check_fits(1 << 80, None, what="x", where="y", advice="z") is None


def test_this_machine() -> None:
    room = machine_memory()
    assert room is None or 0 < room.free <= room.total


def test_only_what_never_fits_is_refused() -> None:
    words = {"what": "Training", "where": "this machine", "advice": "Take less."}
    assert check_fits(GIB, Room(4 * GIB, 2 * GIB), **words) is None
    warning = check_fits(3 * GIB, Room(4 * GIB, 2 * GIB), **words)
    numbers = "Training needs at least 3.0 GiB of memory, but this machine has 4.0 GiB, 2.0 GiB of it free now"
    assert warning == f"{numbers}. The process may end for lack of memory. Take less."
    with pytest.raises(NotEnoughMemory, match=r"needs at least 5\.0 GiB of memory, but this machine has 4\.0 GiB, 2\.0 GiB of it free\. Take less\."):
        check_fits(5 * GIB, Room(4 * GIB, 2 * GIB), **words)
