"""The table of a checkpoint's parts: which process wrote each file, and which part of every weight that process held.

It lies in the checkpoint as `division.json`. Checkpoints of other programs, and of versions before it, have none: their weights are whole, or divided
as GPT-NeoX divides them (`shards.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.model.division import Cut, Span
from megatron.mpu.topology import Layout, Place, Topology

FORMAT = 1


@dataclass(frozen=True)
class Table:
    """What each process held when the checkpoint was saved."""

    topology: Topology
    """Of the first process."""
    cuts: Mapping[str, Mapping[int, Cut]]
    """Name -> process -> its part. A process that does not hold the weight is not in it."""
    writers: Mapping[str, int]
    """File -> the process that wrote it."""
    orders: Mapping[int, Sequence[Sequence[str]]]
    """Process -> the names in its optimizer's groups, where the state is by number and not by name."""

    @property
    def is_divided(self) -> bool:
        """Whether some process held less than a whole weight, or not all weights."""
        return self.topology.layout != Layout()

    def place(self, process: int) -> Place:
        """The coordinates of a process."""
        return self.topology.place_of(process)


def table_bytes(table: Table) -> bytes:
    """The content of `division.json`. Parts that several processes hold alike are written once."""
    size = table.topology
    weights = {}
    for name, by_process in table.cuts.items():
        grouped: dict[Cut, list[int]] = {}
        for process, cut in by_process.items():
            grouped.setdefault(cut, []).append(process)
        parts = [{"spans": _spans_out(cut), "processes": processes} for cut, processes in grouped.items()]
        weights[name] = {"shape": list(next(iter(grouped)).shape), "parts": parts}
    content = {
        "format": FORMAT,
        "world_size": size.world_size,
        "layout": size.layout._asdict(),
        "files": dict(table.writers),
        "optimizer_orders": {str(process): order for process, order in table.orders.items() if order},
        "weights": weights,
    }
    return (json.dumps(content) + "\n").encode()


def read_table(path: Path) -> Table | None:
    """The table of the checkpoint at `path`; None where it has none. Raises CheckpointError for one that cannot be read."""
    file = path / layout.DIVISION
    try:
        content = json.loads(file.read_text())
        if content["format"] > FORMAT:
            raise CheckpointError(f"{file} is of a later version of this program (format {content['format']}): load it with that version.")
        return Table(
            Topology(content["world_size"], layout=Layout(**content["layout"])),
            {name: dict(_parts_in(weight)) for name, weight in content["weights"].items()},
            {str(name): int(process) for name, process in content["files"].items()},
            {int(process): order for process, order in content["optimizer_orders"].items()},
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}): it must say which part each process held.") from error


def _spans_out(cut: Cut) -> list[Any]:
    return [[[span.start, span.stop] if span.owned else [span.start, span.stop, 0] for span in spans] for spans in cut.spans]


def _parts_in(weight: Mapping[str, Any]) -> Iterable[tuple[int, Cut]]:
    shape = tuple(int(size) for size in weight["shape"])
    for part in weight["parts"]:
        spans = tuple(tuple(Span(int(span[0]), int(span[1]), len(span) < 3) for span in dimension) for dimension in part["spans"])
        for process in part["processes"]:
            yield int(process), Cut(shape, spans)
