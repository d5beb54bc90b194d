"""Expert choice: every expert takes its best tokens, so the load is even by construction (Zhou et al., 2022, section 3.2).

Shapes: T tokens; D model width; E experts; K = E places per token; C tokens per expert.

    C = T * K' / E with K' = `moe_top_k`, the mean number of experts per token;  weight = softmax over experts, at the chosen pairs
Tokens are chosen among all tokens of the micro-batch, later ones included: what a token gets depends on what follows it. That is as published, for
training; text generated token by token sees other choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import Jitter, RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class ExpertChoiceRouter(nn.Module):
    """A token that no expert takes passes through the residual stream alone."""

    looks_at_later_tokens = True

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.num_experts, self.mean_experts = moe.num_experts, moe.top_k

    def forward(self, x_TD: Tensor) -> Routing:
        """Place e of a token holds expert e where e chose the token."""
        logit_TE = self.layer(self.jitter(x_TD))
        probability_TE = logit_TE.softmax(-1)
        tokens = x_TD.shape[0]
        capacity = min(tokens, max(1, round(tokens * self.mean_experts / self.num_experts)))
        token_CE = probability_TE.detach().topk(capacity, dim=0).indices
        chosen_TE = torch.zeros_like(probability_TE, dtype=torch.bool).scatter_(0, token_CE, True)
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        expert_TE = torch.where(chosen_TE, expert_E, self.num_experts)
        return Routing(expert_TE, probability_TE * chosen_TE, probability_TE, logit_TE, padded=True)
