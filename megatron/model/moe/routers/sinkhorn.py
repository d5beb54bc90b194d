"""GPT-NeoX's default router: in training the experts are assigned by Sinkhorn's balancing (Clark et al., 2022, S-BASE), without a balance loss.

Shapes: T tokens; D model width; E experts; K experts per token.

    training:   experts = top K of sinkhorn(logits), no gradient;   inference: top K of the activation
    weights = activation at the experts, not renormalised;          activation = sigmoid(logits) for K = 1, softmax(logits) for K > 1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

MAX_ROUNDS, TOLERANCE, EPSILON = 3, 1e-4, 1e-8


class SinkhornRouter(nn.Module):
    """Balanced over the micro-batch while training."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.top_k = moe.top_k

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token."""
        logit_TE = self.layer(x_TD)
        activation_TE = logit_TE.sigmoid() if self.top_k == 1 else logit_TE.softmax(-1)
        preference_TE = sinkhorn(logit_TE.detach()) if self.training else activation_TE.detach()
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        return Routing(expert_TK, activation_TE.gather(1, expert_TK), activation_TE, logit_TE)


@torch.no_grad()
def sinkhorn(logit_TE: Tensor) -> Tensor:
    """exp(logit) scaled by rows and columns so that rows sum to about 1/T and columns to 1/E, in float32 (float64 for float64).

    As GPT-NeoX does it: columns start at 1 / (E * their sum), at most three rounds, fewer when the column factors moved by less than 1e-4 on average.
    """
    cost_TE = logit_TE.to(torch.promote_types(logit_TE.dtype, torch.float32)).exp()
    tokens, experts = cost_TE.shape
    column_E = 1 / (experts * cost_TE.sum(0))
    row_T, still = cost_TE.new_empty(tokens), torch.ones((), dtype=torch.bool, device=cost_TE.device)
    for _ in range(MAX_ROUNDS):  # a round after the last is computed and not taken, rather than asking the device whether it is needed
        before_E = column_E
        row_T = torch.where(still, 1 / (tokens * ((column_E * cost_TE).sum(1) + EPSILON)), row_T)
        column_E = torch.where(still, 1 / (experts * ((row_T[:, None] * cost_TE).sum(0) + EPSILON)), column_E)
        still = still & ~((before_E - column_E).abs().mean() < TOLERANCE)
    return column_E * cost_TE * row_T[:, None]
