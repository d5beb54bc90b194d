"""The sizes of models as tables for a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from megatron.analysis.size import Layout, Match, ModelSize
from megatron.analysis.tables import bytes_text, plain_table


def overview(sizes: list[ModelSize], layout: Layout) -> Table:
    """A line for each model: parameters, FLOPs, memory."""
    processes = f"{layout.processes} process{'es' if layout.processes > 1 else ''}"
    columns = ("vocabulary", "total", "active", "FLOPs per token", "ZeRO", f"in each of {processes}")
    table = plain_table("config", *columns, numbers=True, whole=columns)
    for size in sizes:
        stage = size.config.optimizer.zero_optimization.stage if layout.zero_stage is None else layout.zero_stage
        numbers = (f"{number:,}" for number in (size.padded_vocabulary, size.count.total_sum, size.count.active_sum))
        table.add_row(escape(size.name), *numbers, f"{size.flops:.3e}", str(stage), bytes_text(size.memory.total))
    return table


def by_part(sizes: list[ModelSize]) -> Table:
    """Parameters by part. For a model with experts the active ones are below. Parts that no model has are left out."""
    parts = [part for part in sizes[0].count.total if any(size.count.total[part] for size in sizes)]
    table = plain_table("config", *parts, numbers=True, whole=tuple(parts))
    for size in sizes:
        table.add_row(escape(size.name), *(f"{size.count.total[part]:,}" for part in parts))
        if size.count.active != size.count.total:
            table.add_row("  active", *(f"{size.count.active[part]:,}" for part in parts))
    return table


def match_table(found: list[Match]) -> Table:
    """A table with a line for each key that can be changed alone."""
    columns = ("key", "value", "parameters then", "difference", "without routers")
    table = plain_table(*columns, numbers=True, whole=columns)
    for match in found:
        table.add_row(match.key, f"{match.value:,}", f"{match.reached:,}", f"{match.difference:+,}", f"{match.without_routers:+,}")
    return table
