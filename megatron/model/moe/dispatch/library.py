"""Experts by a library (`kernel_backends: {experts: ...}`). On one process it computes dispatch, experts and combine; where the experts are divided,
each process computes the rows of its own ones by it. The weights stay those of the layer's experts.

Shapes: T tokens; R rows, sorted by expert; K experts per token; E experts; D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron.kernels.experts import experts as compute_experts
from megatron.kernels.experts import experts_of_rows
from megatron.kernels.experts.interface import Choices
from megatron.model.moe.dispatch.interface import Computed
from megatron.model.moe.routing import LoreRouting, Routing

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig

Compute = Callable[[Any, Tensor, Tensor], tuple[Tensor, LoreRouting | None]]
"""(experts, x_RD, rows_E) -> (y_RD, the second routing; None where there is none)."""


class RoutingNotTaken(ValueError):
    """A router's decision that the library cannot follow."""


class LibraryDispatcher:
    """Hands tokens, decisions and weights to the library."""

    def __init__(self, moe: MoEConfig) -> None:
        self.num_experts, self.backend = moe.num_experts, moe.kernel_backends["experts"]

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        """The tokens' results. `experts` are plain experts: the configuration refuses the others. Raises RoutingNotTaken."""
        if routing.padded:
            raise RoutingNotTaken(
                f"kernel_backends: experts: {self.backend} needs the same number of experts for every token, and this router chooses it by token"
            )
        weights, choices = experts.mlp.matrices(), Choices(routing.expert_TK, routing.weight_TK)
        y_TD = compute_experts(x_TD, choices, weights, activation=experts.mlp.activation, backend=self.backend)
        return Computed(y_TD, routing.rows_E(self.num_experts), None)


def compute_of(moe: MoEConfig) -> Compute:
    """What computes rows that are sorted by expert: the experts, or the library that the configuration names."""
    if moe.dispatcher != "library":
        return lambda experts, x_RD, rows_E: experts(x_RD, rows_E)
    backend = moe.kernel_backends["experts"]

    def by_library(experts: Any, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, None]:
        return experts_of_rows(x_RD, rows_E, experts.mlp.matrices(), activation=experts.mlp.activation, backend=backend), None

    return by_library
