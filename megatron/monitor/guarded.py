"""A destination of numbers whose failure is reported once and does not lose the trained weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron.config import disk
from megatron.monitor.alerts.alert import Alert
from megatron.monitor.sink import Sink, Value

log = logging.getLogger(__name__)


class OutputFailed(RuntimeError):
    """A run could not write a file other than a checkpoint. The message names the file and the disk."""


class GuardedSink:
    """Passes numbers on to `sink` until writing fails. Then `failures` gets a sentence, and nothing more is written.

    `place`: the file or folder that the sink writes to.
    """

    def __init__(self, sink: Sink, place: Path, failures: list[str]) -> None:
        self.sink = sink
        self.place = place
        self.failures = failures
        self._failed = False

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        if not self._failed:
            self._failed = not wrote(lambda: self.sink.write(iteration, values), self.place, self.failures)

    def alert(self, alert: Alert) -> None:
        if not self._failed:
            self._failed = not wrote(lambda: self.sink.alert(alert), self.place, self.failures)

    def close(self) -> None:
        wrote(self.sink.close, self.place, [] if self._failed else self.failures)


def wrote(write: Callable[[], object], place: Path, failures: list[str]) -> bool:
    """Whether `write` succeeded. If the system refused the file, a sentence is logged and added to `failures`."""
    try:
        write()
    except OSError as error:
        failures.append(f"{disk.sentence(error, place)}.")
        log.error("%s", failures[-1])
        return False
    return True
