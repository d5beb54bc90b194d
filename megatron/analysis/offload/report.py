"""Simulations and locality as tables, and as numbers for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from megatron.analysis.routing.locality import LocalityMeans
from megatron.inference.offload.counters import total
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.simulate import simulate
from megatron.monitor.routing_trace import Trace


def residency(trace: Trace, *, granularity: str = "expert") -> list[int]:
    """Slots for 12.5, 25, 50 and 100 % of the units, where one token's fit."""
    units = trace.num_experts * (trace.num_lores if granularity == "lore" else 1)
    steps = [step for layer in trace.layers for step in trace.steps(layer, granularity=granularity)]
    fewest = trace.num_lores if granularity == "lore" else min(map(len, steps))
    return sorted({max(fewest, units // share) for share in (8, 4, 2, 1)})


def simulation_table(
    trace: Trace, policies: Sequence[str], slots: Sequence[int], *, granularity: str = "expert", profile: Trace | None = None
) -> tuple[Table, list[dict[str, Any]]]:
    """(hit rates by policy and slots, all counters). A number of slots that does not hold what is needed together is shown as `-`."""
    table = Table(title="hit rate", box=None, pad_edge=False, header_style="dim")
    table.add_column("policy")
    for count in slots:
        table.add_column(f"{count} slots", justify="right")
    numbers: list[dict[str, Any]] = []
    for policy in policies:
        row = []
        for count in slots:
            try:
                counted = total(simulate(trace, policy=policy, slots=count, granularity=granularity, profile=profile))
            except OffloadError:
                row.append("-")
                continue
            row.append(f"{counted.hit_rate:.1%}")
            numbers.append({"policy": policy, "slots": count, **counted.content()})
        table.add_row(policy, *row)
    return table, numbers


def locality_tables(found: LocalityMeans) -> Iterator[Table]:
    """ExRep and the distance from uniform; SCH and SRP by window."""
    first = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("ExRep", "distance from uniform"):
        first.add_column(title, justify="right")
    first.add_row(f"{found.exrep:.1%}", f"{found.not_uniform:.1%}")
    yield first
    sizes = sorted({size for by_size in found.sch.values() for size in by_size})
    second = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("window", "SRP", "its size", *(f"SCH, {size} slots" for size in sizes)):
        second.add_column(title, justify="right")
    for length, by_size in found.sch.items():
        hits = (f"{by_size[size]:.1%}" for size in sizes)
        second.add_row(str(length), f"{found.srp[length]:.1%}", f"{found.size_ratio[length]:.2f}x", *hits)
    yield second
