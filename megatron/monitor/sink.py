"""The interface of every destination of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron.monitor.alerts.alert import Alert

Value = float | list[float] | list[list[int]]
"""A number, a number of each MoE layer, or a table of counts (MoE layers x experts)."""


class Sink(Protocol):
    """Receives the numbers of a step under NeoX's names (`train/lm_loss`, `runtime/tokens_per_sec`, ...), and alerts."""

    def write(self, iteration: int, values: Mapping[str, Value]) -> None: ...

    def alert(self, alert: Alert) -> None: ...

    def close(self) -> None: ...


class SinkUnavailable(ValueError):
    """A configured destination cannot be used. The message says what is missing."""


def scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """Plain numbers only, for destinations that draw a curve of each number.

    `x_by_layer` becomes `x/layer_0`, `x/layer_1`, ... (counted over the MoE layers), and a table `x/layer_0/0`, `x/layer_0/1`, ...
    """
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, int | float):
            numbers[key] = float(value)
            continue
        rows: Sequence[float | list[int]] = value
        for layer, row in enumerate(rows):
            name = f"{key.removesuffix('_by_layer')}/layer_{layer}"
            if isinstance(row, list):
                numbers |= {f"{name}/{i}": float(count) for i, count in enumerate(row)}
            else:
                numbers[name] = float(row)
    return numbers
