"""Dynamic routing: as many experts as a token needs (Huang et al., 2024, "Harder Tasks Need More Experts", equations 3 to 5).

Shapes: T tokens; D model width; E experts; K = E places per token.

    experts sorted by probability; the fewest whose probabilities sum to at least p;  weight = the probability itself
The paper trains it with the load-balance loss and `entropy`, which keeps the router from spreading its probability over all experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import Jitter, RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class TopPRouter(nn.Module):
    """At least one expert for every token."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.threshold, self.normalize, self.num_experts = moe.moe_router_top_p, moe.moe_normalize_top_k, moe.num_experts

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token, its places beyond the last chosen expert empty."""
        logit_TE = self.layer(self.jitter(x_TD))
        probability_TE = logit_TE.softmax(-1)
        weight_TK, expert_TK = probability_TE.sort(dim=-1, descending=True, stable=True)
        before_TK = weight_TK.detach().cumsum(-1) - weight_TK.detach()
        unused_TK = before_TK >= self.threshold
        unused_TK[:, 0] = False
        weight_TK = weight_TK.masked_fill(unused_TK, 0.0)
        if self.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Routing(expert_TK.masked_fill(unused_TK, self.num_experts), weight_TK, probability_TE, logit_TE, padded=True)
