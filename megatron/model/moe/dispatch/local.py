"""All experts are on this device: dispatch is a sort, nothing is dropped, nothing is sent.

Shapes: T tokens; K experts per token; R routed rows, sorted by expert, T*K where no place is empty; E experts; D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron.kernels.permute import Order, combine, permute, sort_by_group
from megatron.model.moe.dispatch.interface import Computed
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig


@dataclass(frozen=True)
class LocalPlan:
    """The way back, and how many rows each expert got."""

    order: Order
    weight_TK: Tensor

    @property
    def rows_E(self) -> Tensor:
        """int64: rows of each expert."""
        return self.order.rows_G


class LocalDispatcher:
    """Sorts tokens by expert and adds up the results with the router's weights."""

    def __init__(self, moe: MoEConfig) -> None:
        self.num_experts = moe.num_experts
        self.backend = moe.kernel_backends.get("permute", "auto")

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        """Dispatch, experts, combine."""
        x_RD, plan = self.dispatch(x_TD, routing)
        y_RD, lores = experts(x_RD, plan.rows_E)
        return Computed(self.combine(y_RD, plan), plan.rows_E, lores)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, LocalPlan]:
        """(x_RD sorted by expert, plan)."""
        if routing.softmax is not None:
            order = routing.softmax.order
        else:
            order = sort_by_group(routing.expert_TK, self.num_experts, padded=routing.padded, backend=self.backend)
        return permute(x_TD, order, backend=self.backend), LocalPlan(order, routing.weight_TK)

    def combine(self, y_RD: Tensor, plan: LocalPlan) -> Tensor:
        """y_TD: each token's K results, weighted and summed."""
        return combine(y_RD, plan.order, plan.weight_TK, backend=self.backend)
