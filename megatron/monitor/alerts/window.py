"""The last steps' loads, as few of them as say enough.

Shapes: X MoE layers; E experts of a layer.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

MOST_STEPS = 200
Counts = npt.NDArray[np.int64]


class LoadWindow:
    """Sums the loads of the last steps: at least `steps` of them, and as many as give each group `rows` rows if the load is even, but at most 200.

    `groups_X`: how many experts, or LoREs, each layer has.
    """

    def __init__(self, groups_X: Counts, *, steps: int, rows: int) -> None:
        self.groups_X = np.maximum(groups_X, 1)
        self.steps = steps
        self.rows = rows
        self._parts: deque[tuple[Counts, Counts]] = deque()
        """The loads of each step, and their sums over the groups."""
        self._sum: Counts | None = None
        self._total_X = np.zeros_like(self.groups_X)

    def add(self, load_XE: Counts) -> None:
        """The next step."""
        total_X = load_XE.sum(1)
        self._parts.append((load_XE, total_X))
        self._sum = load_XE.copy() if self._sum is None else self._sum + load_XE
        self._total_X = self._total_X + total_X
        while len(self._parts) > self.steps and (len(self._parts) > MOST_STEPS or self._says_enough(self._total_X - self._parts[0][1])):
            first_XE, first_X = self._parts.popleft()
            self._sum, self._total_X = self._sum - first_XE, self._total_X - first_X

    def _says_enough(self, total_X: Counts) -> bool:
        return bool((total_X >= self.rows * self.groups_X).all())

    @property
    def load_XE(self) -> Counts | None:
        """The sum. None: the steps so far do not say enough."""
        if self._sum is None or len(self._parts) < self.steps or not self._says_enough(self._total_X):
            return None
        return self._sum

    def __len__(self) -> int:
        return len(self._parts)
