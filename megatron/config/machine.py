"""What this machine gives to the process that asks."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A mere folder of that name, such as the `wandb/` that Weights & Biases leaves beside a run, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def import_optional(package: str) -> Any:
    """The package as a module. Raises ImportError when it is not installed, also where a mere folder of that name is found in its place."""
    module = importlib.import_module(package)
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise ModuleNotFoundError(f"{package} is a folder, not a package", name=package)
    return module


def usable_cores() -> int:
    """Cores that this process may use, at least 1: those of its affinity, and no more than the container's quota (cgroup v2 or v1) pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(CGROUPS)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: Path) -> float | None:
    """Processor time per time that the container may use; None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroups / file).read_text() for file in files).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no such file, or `max`: no limit is set here
    return None
