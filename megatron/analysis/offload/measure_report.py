"""The measurements in the forms in which they are published: CoSMoEs' Tables 3 and 4, a table by share of resident experts, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron.analysis.offload.measure import Measured, Work, measure

SHARES = (1.0, 0.5, 0.25, 0.125)


class Rows:
    """One model's measurements by name, taken in order."""

    def __init__(self, name: str, work: Work, top_k: int, *, options: Mapping[str, Any]) -> None:
        """`options`: entries of `expert_offload` that all rows share, without slots and policy."""
        self.name = name
        self.resident = measure(work)
        self.on_demand = measure(replace(work, offload={**options, "slots": top_k, "policy": "on_demand"}))
        self.by_share: dict[float, Measured] = {1.0: self.resident}
        policy = options.get("policy", "lru")
        for share in SHARES[1:]:
            slots = max(top_k, round(share * self.resident.experts))
            self.by_share[share] = measure(replace(work, offload={**options, "slots": slots, "policy": policy}))

    @property
    def fetch_to_compute(self) -> float:
        """f/c."""
        return (self.on_demand.fetch_seconds or 0.0) * self.resident.tokens_per_second

    def content(self) -> dict[str, Any]:
        """For JSON."""
        shares = {f"{share:g}": row.content() for share, row in self.by_share.items()}
        found = {"resident": self.resident.content(), "on_demand": self.on_demand.content(), "by_share": shares}
        return {"model": self.name, "fetch_to_compute": self.fetch_to_compute, **found}


def table_3(rows: Sequence[Rows]) -> Table:
    """Expert replacement, generation with offload (equation 8), distance from the uniform distribution."""
    table = _table("Table 3", "Model", "ExRep", "Tok/s Gen", "ΔUni", "f/c")
    for row in rows:
        found = row.on_demand
        table.add_row(row.name, f"{found.exrep:.2%}", f"{found.tokens_per_second:.2f}", f"{found.not_uniform:.2%}", f"{row.fetch_to_compute:.2f}")
    return table


def table_4(rows: Sequence[Rows]) -> Table:
    """Generation and peak memory, with all experts resident and with those of one token."""
    table = _table("Table 4", "Setup", "Tok/s Gen", "Mem GB")
    for row in rows:
        for setup, found in ((row.name, row.resident), (f"{row.name} + Offl", row.on_demand)):
            table.add_row(setup, f"{found.tokens_per_second:.2f}", f"{found.peak_bytes / 1e9:.2f}")
    return table


def residency_table(rows: Sequence[Rows]) -> Table:
    """Hit rate, speed and memory by the share of experts that is resident."""
    table = _table("resident experts", "Model", "resident", "slots", "hit rate", "tok/s", "stall", "Mem GB")
    for row in rows:
        for share, found in row.by_share.items():
            counted = found.counters
            hits, stall = (f"{counted['hit_rate']:.1%}", f"{counted['stall_seconds']:.2f} s") if counted else ("", "")
            slots = str(found.experts if found.slots is None else found.slots)
            table.add_row(row.name, f"{share:.1%}", slots, hits, f"{found.tokens_per_second:.2f}", stall, f"{found.peak_bytes / 1e9:.2f}")
    return table


def plot(rows: Sequence[Rows], picture: Path) -> None:
    """Tokens per second and hit rate by the share of resident experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, hits = figure.subplots(1, 2)
    for row in rows:
        shares = [100 * share for share in row.by_share]
        speed.plot(shares, [found.tokens_per_second for found in row.by_share.values()], marker="o", label=row.name)
        offloaded = {share: found for share, found in row.by_share.items() if found.counters}
        hits.plot([100 * share for share in offloaded], [100 * found.counters["hit_rate"] for found in offloaded.values()], marker="o")
    for axis, title in ((speed, "tokens/s"), (hits, "hit rate, %")):
        axis.set_xlabel("experts resident, %")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    speed.legend()
    figure.savefig(picture, format="png", dpi=120)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    return table
