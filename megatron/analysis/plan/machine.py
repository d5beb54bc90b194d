"""The GPUs and links that a plan is made for: one file each in `machines`, with its source, or a file of the user's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from megatron.analysis.plan.efficiency import LATENCY, LINK_SHARE

MACHINES = Path(__file__).parent / "machines"
GIGA = 1e9


class PlanError(ValueError):
    """What was asked for cannot be planned. The message says why."""


@dataclass(frozen=True)
class Machine:
    """A GPU, its node and its network, as the vendor states them. Links count one direction."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    """Of one GPU."""
    gpus_per_node: int

    def peak(self, *, wide: bool) -> float:
        """Floating-point operations per second of a product in float32 (`wide`) or 16 bits."""
        return (self.fp32_tflops if wide else self.bf16_tflops) * 1e12

    def seconds(self, collective: str, payload: float, ranks: Sequence[int], copies: int = 1) -> float:
        """Time of one collective among these processes (rank r is on node r // gpus_per_node).

        A ring moves 2 (n-1)/n of the payload for an all-reduce and half of that for a gather or a reduction by scattering. A ring over nodes uses the
        ports of all its GPUs of a node. In an exchange each GPU sends through its own port what goes to other nodes; `copies` rows of one token go to
        a node as one.
        """
        size = len(ranks)
        if size == 1 or not payload:
            return 0.0
        here = max(1, sum(rank // self.gpus_per_node == ranks[0] // self.gpus_per_node for rank in ranks))
        inside, port = self.nvlink_gb_per_s * GIGA * LINK_SHARE, self.network_gb_per_s * GIGA * LINK_SHARE
        latency = LATENCY["inside" if here == size else "between"] * math.ceil(math.log2(size))
        if "alltoall" in collective:
            nodes, share = size / here, here / size
            away = payload / copies * (nodes - 1) * (1 - (1 - share) ** copies) / port
            return latency + max(away, payload * (here - 1) / size / inside)
        if collective in ("send", "recv_"):
            return latency + payload / (inside if here == size else port)
        rate = inside if here == size else min(inside, here * port)
        return latency + payload * (2 if "allreduce" in collective else 1) * (size - 1) / size / rate


def machine_names() -> list[str]:
    """Those that come with this package."""
    return sorted(path.stem for path in MACHINES.glob("*.yml"))


def load_machine(name: str, gpus_per_node: int | None = None) -> Machine:
    """By its name, or from the user's file of the same form. `gpus_per_node` None: as the file says. Raises PlanError."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else MACHINES / f"{name}.yml"
    if not path.is_file():
        raise PlanError(f"--gpu {name}: there is no such machine; known: {', '.join(machine_names())}, or give a file of that form that ends in .yml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from error
    machine = _checked(path, values)
    return machine if gpus_per_node is None else replace(machine, gpus_per_node=gpus_per_node)


def _checked(path: Path, values: object) -> Machine:
    names = [field.name for field in fields(Machine)]
    if not isinstance(values, dict) or sorted(map(str, values)) != sorted(names):
        given = {str(key) for key in values} if isinstance(values, dict) else set()
        missing, unknown = [name for name in names if name not in given], sorted(given - set(names))
        wrong = [f"{what}: {', '.join(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise PlanError(f"{path}: must have exactly the keys {', '.join(names)} ({'; '.join(wrong)})")
    for key in names[1:]:
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or not 0 < values[key] < math.inf:
            raise PlanError(f"{path}: '{key}' = {values[key]!r}: must be a number above 0")
    if not isinstance(values["gpus_per_node"], int):
        raise PlanError(f"{path}: 'gpus_per_node' = {values['gpus_per_node']}: must be a whole number")
    return Machine(**values)
