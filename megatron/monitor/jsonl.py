"""metrics.jsonl: one JSON object a line, {"iteration": n, "train/lm_loss": ...}."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.monitor.alerts.alert import Alert
from megatron.monitor.sink import Value

TAIL_BYTES = 1 << 20
TRAIN_LOSS = "train/lm_loss"
"""Every training step's line has this, unless none of its tokens counts in the loss."""


class JsonlSink:
    """Appends to `path` one flushed line for each call, so that a killed run leaves its measurements.

    A run that goes on from step `resume_from` first deletes the lines of later steps, because it will take these steps again. It also deletes the
    line of a final evaluation that will be repeated at once, and a line that a kill cut short. A run from the beginning renames an older file to
    `<name>.previous`. With `resume_from` None nothing is deleted or renamed: whoever writes belongs to no run.
    """

    def __init__(self, path: Path, *, resume_from: int | None, final_evaluation_follows: bool = False) -> None:
        path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_from == 0:
            os.replace(path, path.with_name(f"{path.name}.previous"))
        elif path.exists() and resume_from is not None:
            last = resume_from if final_evaluation_follows else None
            kept = [r for r in read_jsonl(path) if r["iteration"] <= resume_from and not (r["iteration"] == last and _is_evaluation(r))]
            replacement = path.with_name(f".{path.name}.new")
            replacement.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(replacement, path)
        self._file = path.open("ab", buffering=0)  # without a buffer, which would try again what the disk has refused

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Writes one line completely or not at all. Raises the system's OSError."""
        self._append({"iteration": iteration, **{key: _strict(value) for key, value in values.items()}})

    def _append(self, record: Mapping[str, Any]) -> None:
        end, left = os.fstat(self._file.fileno()).st_size, (json.dumps(record) + "\n").encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def alert(self, alert: Alert) -> None:
        """Writes one line, {"iteration": n, "alert": {"kind": ..., "step": n, "layer": ..., "value": ..., "limit": ..., "seen": ..., "try": ...}}."""
        self._append({"iteration": alert.step, "alert": alert.record()})

    def close(self) -> None:
        self._file.close()


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    return any(key.startswith(("validation/", "test/")) for key in record)


def _strict(value: Value) -> Value | None:
    """JSON knows neither NaN nor infinity: null stands for both."""
    return value if isinstance(value, list) or math.isfinite(value) else None


def last_numbers(path: Path, key: str, count: int) -> list[float]:
    """The last numbers of a key, at most `count`, oldest first. Only the end of the file is read, so there may be fewer; none if there is no file."""
    if not path.is_file():
        return []
    found = [record[key] for record in read_jsonl(path, last_bytes=TAIL_BYTES) if isinstance(record.get(key), int | float)]
    return found[-count:]


def read_jsonl(path: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, or those in its last bytes. Lines that are not complete records are left out. `last_bytes` None: all."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if last_bytes is not None:
            file.seek(max(0, path.stat().st_size - last_bytes))
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                yield record
