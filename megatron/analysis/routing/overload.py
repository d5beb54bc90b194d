"""Expert parallelism: how much more than the mean the busiest process would receive. Formulas: `findings.Overload`.

Experts lie in equal blocks, as `moe_expert_parallel_size` divides them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron.analysis.routing.blocks import Shape, View, divided
from megatron.analysis.routing.findings import Counts, Floats, Overload
from megatron.analysis.routing.load import choice_counts


class OverloadCount:
    """Batches of at least `batch_tokens` tokens, in the order in which the blocks come."""

    def __init__(self, shape: Shape, processes: Sequence[int], *, batch_tokens: int) -> None:
        self._shape, self._processes, self._batch_tokens = shape, list(processes), batch_tokens
        size = len(shape.layers), len(self._processes)
        self._sum_LR, self._worst_LR, self._batches = np.zeros(size), np.full(size, np.nan), 0
        self._open_LE = np.zeros((len(shape.layers), shape.experts), np.int64)
        self._whole_LE, self._open_tokens = np.zeros_like(self._open_LE), 0

    def add(self, view: View) -> None:
        """Counts the new tokens."""
        rows_LE = choice_counts(view.block, self._shape).sum(1)
        self._open_LE += rows_LE
        self._whole_LE += rows_LE
        self._open_tokens += len(view.block.expert_TLK)
        if self._open_tokens >= self._batch_tokens:
            self._close()

    def found(self) -> Overload:
        """Of all tokens so far. A last batch that is smaller than half of the others is left out, if there are others."""
        if not self._batches or self._open_tokens * 2 >= self._batch_tokens:
            self._close()
        return Overload(self._processes, self._batch_tokens, self._sum_LR / self._batches, self._worst_LR, self._overloads(self._whole_LE))

    def _close(self) -> None:
        overload_LR = self._overloads(self._open_LE)
        self._sum_LR += overload_LR
        self._worst_LR = np.fmax(self._worst_LR, overload_LR)
        self._batches += 1
        self._open_LE[:], self._open_tokens = 0, 0

    def _overloads(self, rows_LE: Counts) -> Floats:
        counts = self._shape.experts_L
        return np.array([[overload(row_E[:count], size) for size in self._processes] for row_E, count in zip(rows_LE, counts, strict=True)])


def overload(rows_E: Counts, processes: int) -> float:
    """Largest number of rows of a process over the mean; NaN where the experts do not divide, or without rows."""
    if len(rows_E) % processes:
        return float("nan")
    rows_R = rows_E.reshape(processes, -1).sum(1)
    return float(divided(rows_R.max(), rows_R.mean()))


def sizes(shape: Shape) -> list[int]:
    """Numbers of processes to show: powers of two, and the number of experts, that divide the experts of a layer."""
    powers = [1 << bit for bit in range(1, 12)]
    return [size for size in sorted({*powers, shape.experts}) if size > 1 and any(not count % size for count in shape.experts_L if count >= size)]
