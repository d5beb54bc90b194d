"""What a dispatcher is: it brings every token to its experts, has them computed, and brings the results back.

Shapes: T tokens; E experts; D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from megatron.model.moe.routing import LoreRouting, Routing

Meanwhile = Callable[[], None]
"""What a process computes while rows are on their way."""


class Computed(NamedTuple):
    """What the experts made of the tokens."""

    y_TD: Tensor
    rows_E: Tensor
    """int64: rows of each expert."""
    lores: LoreRouting | None
    """The second routing; None where there is none."""
    overload_2: Tensor | None = None
    """float32: the most rows that an expert-parallel process received over the mean, and the seconds that this costs (NaN on a device that computes
    while the host goes on). None where nothing is sent."""


class Dispatcher(Protocol):
    """All that a layer with experts asks of a dispatcher."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        """Dispatch, experts, combine."""
        ...


@runtime_checkable
class Waiting(Protocol):
    """A dispatcher that waits for other processes."""

    def run_while(self, x_TD: Tensor, routing: Routing, experts: Any, meanwhile: Meanwhile) -> Computed:
        """As `Dispatcher.run`. It calls `meanwhile` once, where it would wait."""
        ...


def run_beside(dispatcher: Dispatcher, x_TD: Tensor, routing: Routing, experts: Any, *, meanwhile: Meanwhile) -> Computed:
    """Runs the dispatcher, and `meanwhile` in the time that it waits. A dispatcher that does not wait is run first."""
    if isinstance(dispatcher, Waiting):
        return dispatcher.run_while(x_TD, routing, experts, meanwhile)
    computed = dispatcher.run(x_TD, routing, experts)
    meanwhile()
    return computed
