"""DeepSeek-V3's router: sigmoid scores, a bias that balances the load without a loss, and a choice limited to groups of experts.

Shapes: T tokens; D model width; E experts; K experts per token; N groups of experts.

    s = sigmoid(logits);  choice = top K of s + b among the experts of the best groups;  weight = scale * s / sum of the chosen s
    (DeepSeek-V3, equations 12 to 16; the choice of groups, section 2.1.2: by the sum of the two highest s + b of each group.)
The bias b only chooses: weights and losses see s. How b follows the load: `BalanceBias`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import BalanceBias, Jitter, RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class SigmoidRouter(nn.Module):
    """Weights are divided by their sum unless `moe_normalize_top_k` is false, and multiplied by `moe_router_topk_scaling_factor`."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.balance = BalanceBias(moe.num_experts, moe.moe_router_bias_update_rate)
        self.top_k, self.normalize, self.scale = moe.top_k, moe.moe_normalize_top_k, moe.moe_router_topk_scaling_factor
        self.groups, self.chosen_groups = moe.moe_router_num_groups, moe.moe_router_group_topk

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token; `probability_TE` are the scores, which need not sum to 1."""
        logit_TE = self.layer(self.jitter(x_TD))
        score_TE = logit_TE.sigmoid()
        preference_TE = self.balance(score_TE.detach())
        if self.groups is not None and self.chosen_groups is not None:
            preference_TE = within_best_groups(preference_TE, self.groups, self.chosen_groups)
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if self.normalize:
            smallest = torch.finfo(weight_TK.dtype).tiny  # scores of logits below -100 vanish
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=smallest)
        return Routing(expert_TK, self.scale * weight_TK, score_TE, logit_TE)


def within_best_groups(preference_TE: Tensor, groups: int, chosen: int) -> Tensor:
    """The preferences, with minus infinity outside the best groups. The best `chosen` groups of a token are those with the largest sum of the two
    highest
    preferences."""
    preference_TNe = preference_TE.unflatten(-1, (groups, -1))
    group_TN = preference_TNe.topk(min(2, preference_TNe.shape[-1]), dim=-1).values.sum(-1)
    excluded_TN = torch.ones_like(group_TN, dtype=torch.bool).scatter_(1, group_TN.topk(chosen, dim=-1).indices, False)
    return preference_TNe.masked_fill(excluded_TN[:, :, None], -torch.inf).flatten(1)
