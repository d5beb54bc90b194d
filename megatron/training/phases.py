"""Measures the time of the parts of a step without making the device wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Phases:
    """`with phases("forward"): ...` may be used any number of times and may be nested. `seconds` sums the time of each name on the device.

    On CUDA the time is measured by events in the stream, which are read after the device has passed them. Elsewhere it is measured by the clock.
    """

    _mark: Callable[[], Any]
    _between: Callable[[Any, Any], float]

    def __init__(self, device: torch.device) -> None:
        self._mark, self._between = (_cuda_mark, _cuda_seconds) if device.type == "cuda" else (time.perf_counter, _clock_seconds)
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name. Call it after the device has finished everything that was measured."""
        totals: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            totals[name] += self._between(start, end)
        return dict(totals)


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) / 1000


def _clock_seconds(start: float, end: float) -> float:
    return end - start
