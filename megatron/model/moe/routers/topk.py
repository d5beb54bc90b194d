"""Softmax over all experts, then the K most probable (Shazeer et al., 2017; Switch for K = 1).

Shapes: T tokens; D model width; E experts; K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Fill, Initializer
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class RouterLinear(nn.Module):
    """Logits of every expert, computed in float32 (float64 for float64) whatever the model's dtype."""

    def __init__(self, width: int, num_experts: int, fill: Fill) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        fill(self.weight.data)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logit_TE."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return nn.functional.linear(x_TD.to(dtype), self.weight.to(dtype))


class TopKRouter(nn.Module):
    """The weights are the chosen experts' probabilities, divided by their sum only where `moe_normalize_top_k` says so."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.moe_num_experts, init.into)
        self.top_k, self.normalize, self.jitter = moe.moe_top_k, moe.moe_normalize_top_k, moe.moe_jitter_eps or 0.0

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token; in training the input is jittered where `moe_jitter_eps` is given."""
        if self.training and self.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logit_TE = self.layer(x_TD)
        probability_TE = logit_TE.softmax(-1)
        weight_TK, expert_TK = top_k(probability_TE, self.top_k, normalize=self.normalize)
        return Routing(expert_TK, weight_TK, probability_TE, logit_TE)


def top_k(probability_TE: Tensor, count: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """(weights, choices) of the `count` largest of each row, largest first; `normalize` divides the weights by their sum."""
    weight_TK, choice_TK = probability_TE.topk(count, dim=-1)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK, choice_TK
