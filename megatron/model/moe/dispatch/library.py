"""Dispatch, experts and combine by one library (`kernel_backends: {experts: ...}`). The weights stay those of the layer's experts.

Shapes: T tokens; K experts per token; E experts; D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.kernels.experts import experts as compute_experts
from megatron.kernels.experts.interface import Choices
from megatron.model.moe.dispatch.local import Computed
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig


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
        return Computed(y_TD, self._rows(routing), None)

    def _rows(self, routing: Routing) -> Tensor:
        """rows_E, without waiting for the device."""
        if routing.softmax is not None:
            return routing.softmax.order.rows_G
        expert_N = routing.expert_TK.reshape(-1)
        return expert_N.new_zeros(self.num_experts).scatter_add_(0, expert_N, torch.ones_like(expert_N))
