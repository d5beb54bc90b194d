"""Loss spikes and streaks of steps that are NaN or infinite."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable

from megatron.monitor.alerts.alert import Alert

MEMORY = 100
"""Losses that are remembered."""
RECENT = 20
"""The median of so many losses is what the next one is compared with."""
FEWEST = 10
"""With fewer losses than this nothing is judged."""
TO_DEVIATION = 1.4826 / math.sqrt(2)
"""From the median distance of neighbours to the standard deviation of one, for normal noise."""


class LossSpikes:
    """A loss is a spike if it is above the median of the last 20 by more than `rise` nats and by more than `deviations` robust standard deviations.

    The standard deviation comes from the distances of neighbouring losses, so a loss that falls fast does not widen it. One alert for each spike: it
    ends with a loss below the middle of median and limit.
    """

    def __init__(self, *, rise: float, deviations: float) -> None:
        self.rise = rise
        self.deviations = deviations
        self._losses: deque[float] = deque(maxlen=MEMORY)
        self._above = False

    def remember(self, losses: Iterable[float]) -> None:
        """Losses of steps before a restart. They are not judged."""
        self._losses.extend(filter(math.isfinite, losses))

    def judge(self, step: int, loss: float) -> list[Alert]:
        """Give it every step's loss. A loss that is NaN or infinite is left out."""
        if not math.isfinite(loss):
            return []
        limit, median = self._limit()
        above = loss > limit
        found = above and not self._above
        self._above = above or (self._above and loss > (median + limit) / 2)
        self._losses.append(loss)
        if not found:
            return []
        before = min(RECENT, len(self._losses) - 1)
        seen = f"The loss is {loss:.3f}. The median of the {before} steps before is {median:.3f}, and the limit is {limit:.3f}."
        return [Alert(kind="loss_spike", step=step, value=loss, limit=limit, seen=seen)]

    def _limit(self) -> tuple[float, float]:
        losses = list(self._losses)
        if len(losses) < FEWEST:
            return math.inf, math.nan
        median = statistics.median(losses[-RECENT:])
        deviation = TO_DEVIATION * statistics.median(abs(after - before) for before, after in itertools.pairwise(losses))
        return median + max(self.rise, self.deviations * deviation), median


class NonfiniteSteps:
    """An alert after `limit` steps in a row whose loss or gradient is NaN or infinite, and again whenever the streak has become twice as long."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self._next = limit
        self._streak = 0

    def judge(self, step: int, *, finite: bool, loss: float, grad_norm: float) -> list[Alert]:
        """`finite`: whether the loss and the gradients of this step are numbers."""
        if finite:
            self._streak, self._next = 0, self.limit
            return []
        self._streak += 1
        if self._streak < self._next:
            return []
        self._next = 2 * self._streak
        what = f"The loss is {loss:.3f}" if not math.isfinite(loss) else f"The gradient norm is {grad_norm:.3f}"
        steps = " in this step" if self._streak == 1 else f", and the last {self._streak} steps in a row were not finite"
        return [Alert(kind="nan_streak", step=step, value=self._streak, limit=self.limit, seen=f"{what}{steps}.")]
