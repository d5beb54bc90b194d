"""What is known of a run: a column of steps and numbers for each key, some tables, and its alerts."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.analysis.dashboard.follow import MetricsFile, Replaced
from megatron.monitor.curves import OF_PARAMETERS

METRICS = "metrics.jsonl"
MOST_SNAPSHOTS = 200
"""If there are more, every second one is dropped."""
MOST_ALERTS = 1000
Numbers = npt.NDArray[np.float64]


@dataclass
class Column:
    """The numbers of a key, in the order of their steps. NaN stands for NaN and infinity."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def cut(self, step: int) -> None:
        """Forgets this step and later ones."""
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.values[place:]

    @property
    def last(self) -> float | None:
        """The newest number. None: there is none."""
        return self.values[-1] if self.values else None


class Snapshot(NamedTuple):
    """Numbers by layer and tables of one step."""

    step: int
    values: dict[str, list[Any]]


class Run:
    """Follows the metrics of one run. `refresh` reads what is new."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.file = MetricsFile(path / METRICS if not path.is_file() else path)
        self.version = 0
        """Grows with every change."""
        self.trouble: str | None = None
        """Why the file cannot be read. None: it can."""
        self._forget()

    def _forget(self) -> None:
        self.columns: dict[str, Column] = {}
        self.alerts: list[dict[str, Any]] = []
        self.latest: Snapshot | None = None
        self.snapshots: list[Snapshot] = []
        self._stride = 1
        self._seen = 0
        self.last_step = -1

    def refresh(self) -> None:
        """Reads what the run has written since the last call."""
        before = self.trouble
        try:
            try:
                self._read()
            except Replaced:
                self._forget()
                self.version += 1
                self._read()
        except Replaced:  # it was replaced twice: the next call reads it
            self._forget()
        except OSError as error:
            self.trouble = f"{self.file.path} cannot be read: {error.strerror or error}"
        else:
            self.trouble = None
        self.version += self.trouble != before

    def _read(self) -> None:
        for record in self.file.new_records():
            self.version += 1
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        step: int = record["iteration"]
        if step < self.last_step:
            self._go_back(step)
        self.last_step = step
        lists: dict[str, list[Any]] = {}
        columns = self.columns
        for key, value in record.items():
            if type(value) is float and key in columns:  # nearly all numbers
                columns[key].steps.append(step)
                columns[key].values.append(value)
            elif isinstance(value, list):
                lists[key] = value
            elif key == "alert":
                if is_alert(value) and len(self.alerts) < MOST_ALERTS:
                    self.alerts.append(value)
            elif key != "iteration" and not key.startswith(OF_PARAMETERS) and (number := as_number(value)) is not None:
                column = columns.setdefault(key, Column())
                column.steps.append(step)
                column.values.append(number)
        if lists:
            self._add_lists(step, lists)

    def _add_lists(self, step: int, lists: dict[str, list[Any]]) -> None:
        for key, value in lists.items():
            if key.endswith("_by_layer"):
                numbers = [number for one in value if (number := as_number(one)) is not None and math.isfinite(number)]
                for end, number in (("min", min(numbers)), ("max", max(numbers))) if numbers else ():
                    column = self.columns.setdefault(f"{key.removesuffix('_by_layer')}/{end}", Column())
                    column.steps.append(step)
                    column.values.append(number)
        self.latest = Snapshot(step, lists)
        if self._seen % self._stride == 0:
            self.snapshots.append(self.latest)
        self._seen += 1
        if len(self.snapshots) > MOST_SNAPSHOTS:
            del self.snapshots[1::2]
            self._stride *= 2

    def _go_back(self, step: int) -> None:
        """The run has taken up its work at an earlier step."""
        for column in self.columns.values():
            column.cut(step)
        self.alerts = [alert for alert in self.alerts if alert["step"] < step]
        self.snapshots = [one for one in self.snapshots if one.step < step]
        self.latest = self.snapshots[-1] if self.snapshots else None

    def column(self, key: str) -> tuple[npt.NDArray[np.int64], Numbers]:
        """(steps, numbers); empty if the run has no such key."""
        column = self.columns.get(key, Column())
        return np.array(column.steps, dtype=np.int64), np.array(column.values, dtype=np.float64)

    def last(self, key: str) -> float | None:
        """The newest number of a key. None: there is none."""
        column = self.columns.get(key)
        return None if column is None else column.last

    def matrix(self, key: str) -> tuple[list[int], Numbers]:
        """(steps, snapshots x layers) of a key that has a number for each layer; snapshots of another width are left out."""
        found = [(one.step, one.values[key]) for one in self.snapshots if is_row(one.values.get(key))]
        width = len(found[-1][1]) if found else 0
        found = [(step, row) for step, row in found if len(row) == width]
        return [step for step, _ in found], np.array([[math.nan if x is None else x for x in row] for _, row in found], dtype=np.float64)

    def table(self, key: str) -> list[Numbers]:
        """The newest table of a key, a row for each layer; empty if the run has none."""
        value = None if self.latest is None else self.latest.values.get(key)
        rows = value if isinstance(value, list) and all(map(is_row, value)) else []
        return [np.array(row, dtype=np.float64) for row in rows]

    def tables(self, key: str) -> tuple[list[int], list[list[Numbers]]]:
        """(steps, tables) of a key, one for each snapshot that has the newest one's form."""
        form = [len(row) for row in self.table(key)]
        found = [(one.step, one.values.get(key)) for one in self.snapshots]
        kept = [(step, rows) for step, rows in found if isinstance(rows, list) and all(map(is_row, rows)) and [len(row) for row in rows] == form]
        return [step for step, _ in kept], [[np.array(row, dtype=np.float64) for row in rows] for _, rows in kept]


def is_row(value: Any) -> bool:
    """Whether this is a list of numbers, in which null may stand for NaN."""
    return isinstance(value, list) and all(one is None or as_number(one) is not None for one in value)


def is_alert(value: Any) -> bool:
    """Whether the page can show it."""
    return isinstance(value, dict) and type(value.get("step")) is int and all(isinstance(value.get(key), str) for key in ("kind", "seen", "try"))


def as_number(value: Any) -> float | None:
    """The number; NaN for null, which stands for NaN and infinity. None: it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.nan


def name_runs(paths: list[Path]) -> list[str]:
    """A name for each run: the last parts of its path, as many as tell it from the others."""
    parts = [list(path.absolute().parts if path.suffix != ".jsonl" else path.absolute().parts[:-1]) for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
