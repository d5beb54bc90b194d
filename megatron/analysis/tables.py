"""Tables and numbers for the output of commands."""

from __future__ import annotations

from rich.table import Table


def plain_table(*columns: str, numbers: bool = False, whole: tuple[str, ...] = ()) -> Table:
    """A table without lines. `numbers`: all columns but the first are aligned to the right. The `whole` columns are never broken."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and position else "left", overflow="fold", no_wrap=column in whole)
    return table


def bytes_text(number: float) -> str:
    """The bytes in the largest unit that gives a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
