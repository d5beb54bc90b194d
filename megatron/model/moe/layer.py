"""The MoE layer: route, dispatch, compute, combine. Losses and counts are return values.

Shapes: B batch; S sequence; T = B*S tokens; R routed rows; E experts; G LoREs of all experts; D model width; A auxiliary losses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megatron.config.components import DISPATCHERS, EXPERTS, LOSSES, ROUTERS, resolve_component
from megatron.model.initialization import Initializer
from megatron.model.moe.routing import LossContext, Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class MoEOutput(NamedTuple):
    """What one MoE layer hands on."""

    y_BSD: Tensor
    aux_losses_A: Tensor
    """float32, unweighted, in the order of `moe_losses`."""
    expert_load_E: Tensor
    """int64: tokens sent to each expert."""
    lore_load_G: Tensor
    """int64: tokens sent to each LoRE; G = 0 where there are none."""


class MoELayer(nn.Module):
    """The feed-forward part of a transformer layer as a mixture of experts."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.router = resolve_component(ROUTERS, moe.moe_router_type)(model, moe, init)
        self.experts = resolve_component(EXPERTS, moe.moe_expert_type)(model, moe, init)
        self.dispatcher = resolve_component(DISPATCHERS, "local")(moe)
        self.losses = [resolve_component(LOSSES, name) for name in moe.moe_losses]
        self.context = LossContext(moe.moe_num_experts, moe.moe_top_k)

    def forward(self, x_BSD: Tensor) -> MoEOutput:
        """The layer's output, losses and loads."""
        x_TD = x_BSD.flatten(0, 1)
        routing = replace(self.router(x_TD), batch_shape=x_BSD.shape[:2])
        x_RD, plan = self.dispatcher.dispatch(x_TD, routing)
        y_RD, lore_routing = self.experts(x_RD, plan.rows_E)
        y_TD = self.dispatcher.combine(y_RD, plan)
        lore_load_G = plan.rows_E.new_zeros(0) if lore_routing is None else lore_routing.rows_G
        return MoEOutput(y_TD.view(x_BSD.shape), self._auxiliary_losses(routing), plan.rows_E, lore_load_G)

    def _auxiliary_losses(self, routing: Routing) -> Tensor:
        if not self.losses:
            return torch.zeros(0, device=routing.logit_TE.device)
        return torch.stack([loss(routing, self.context).float() for loss in self.losses])
