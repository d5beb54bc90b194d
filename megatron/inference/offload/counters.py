"""What is counted while experts move, for one layer: plain numbers, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table


@dataclass
class Counters:
    """Of one layer, or of all together. A selection is a unit (expert or LoRE) that a call needs: with one token a call, its chosen experts."""

    calls: int = 0
    """Calls of the layer, each with one token or more."""
    selections: int = 0
    """Units that the calls needed, each once a call."""
    hits: int = 0
    """Selections whose unit was in a slot already, or on its way there by a prefetch."""
    loads: int = 0
    """Units that were moved into a slot because a call needed them: selections - hits, where nothing is computed in place."""
    replacements: int = 0
    """Loads and prefetches that took the slot of another unit."""
    in_place: int = 0
    """Selections that were computed where the unit rests."""
    bytes: int = 0
    """Read from the store, prefetches included."""
    host_hits: int = 0
    """Reads that the host's tier answered."""
    stall_seconds: float = 0.0
    """How long the computation waited for reads."""
    prefetches: int = 0
    """Units that were read before the router had chosen."""
    prefetches_used: int = 0
    prefetches_wasted: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits per selection, 0 to 1; 0 without selections."""
        return self.hits / self.selections if self.selections else 0.0

    @property
    def replacement_ratio(self) -> float:
        """Loads per selection, in the sense of CoSMoEs' ExRep."""
        return self.loads / self.selections if self.selections else 0.0

    def plus(self, other: Counters) -> Counters:
        """The sums."""
        return Counters(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def minus(self, earlier: Counters) -> Counters:
        """What was counted since `earlier`."""
        return Counters(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def content(self) -> dict[str, Any]:
        """For JSON: the numbers and the two ratios."""
        return {**asdict(self), "hit_rate": self.hit_rate, "replacement_ratio": self.replacement_ratio}


def total(by_layer: Mapping[int, Counters]) -> Counters:
    """All layers together."""
    result = Counters()
    for counters in by_layer.values():
        result = result.plus(counters)
    return result


Shown = Callable[[Counters], str]
COLUMNS: Mapping[str, Shown] = {
    "selected": lambda counted: f"{counted.selections:,}",
    "hits": lambda counted: f"{counted.hits:,}",
    "hit rate": lambda counted: f"{counted.hit_rate:.1%}",
    "loads": lambda counted: f"{counted.loads:,}",
    "replaced": lambda counted: f"{counted.replacements:,}",
    "MB": lambda counted: f"{counted.bytes / 1e6:,.1f}",
    "wait, s": lambda counted: f"{counted.stall_seconds:.2f}",
}
IN_PLACE: Mapping[str, Shown] = {"in place": lambda counted: f"{counted.in_place:,}"}
PREFETCHES: Mapping[str, Shown] = {
    "prefetched": lambda counted: f"{counted.prefetches:,}",
    "used": lambda counted: f"{counted.prefetches_used:,}",
    "wasted": lambda counted: f"{counted.prefetches_wasted:,}",
}


def counters_table(by_layer: Mapping[int, Counters]) -> Table:
    """A row for each layer, and one for all. What never happened has no column."""
    together = total(by_layer)
    columns = {**COLUMNS, **(IN_PLACE if together.in_place else {}), **(PREFETCHES if together.prefetches else {})}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("layer", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for label, counters in [*((str(layer), each) for layer, each in sorted(by_layer.items())), ("all", together)]:
        table.add_row(label, *(shown(counters) for shown in columns.values()))
    return table
