"""metrics.jsonl: one JSON object a line, {"iteration": n, "train/lm_loss": ...}."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.monitor.sink import Value


class JsonlSink:
    """Appends to `path`. Lines of steps after `resume_from` are dropped first: the run is about to take those steps again.

    A line that a kill cut short is dropped as well. Each line is flushed, so that a killed run leaves what it measured.
    """

    def __init__(self, path: Path, *, resume_from: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in read_jsonl(path) if record["iteration"] <= resume_from]
            replacement = path.with_name(f".{path.name}.new")
            replacement.write_text("".join(kept), encoding="utf-8")
            os.replace(replacement, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        self._file.write(json.dumps({"iteration": iteration, **{key: _strict(value) for key, value in values.items()}}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _strict(value: Value) -> Value | None:
    """JSON knows neither NaN nor infinity: null stands for both."""
    return value if isinstance(value, list) or math.isfinite(value) else None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; lines that are not whole records are left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                yield record
