"""Quantile balancing: a bias on each expert's logit that is computed from the last step, so that nothing has to be tuned (Megatron-Core 0.19).

Shapes: T tokens; D model width; E experts; K experts per token; C counts of scores.

    choice = top K of logit + b;    weight = the softmax of the logits over all experts, at the chosen ones
    after a step:  a_t = the (K+1)-th largest of logit_t + b;    -b_e = the value that logit_te - a_t exceeds for T K / E tokens;  then b -= mean(b)
This is one step of coordinate descent on the dual of the balanced assignment: with -b_e as its price, expert e is wanted by an even share of the
tokens. The facts are those of `qb_dual_update`, `_update_router_qb_beta` and `moe_router_quantile_balancing_ema` in megatron-core 0.19.2.

Megatron-Core takes the quantile in each micro-batch and process, and then the mean. Here it is taken over all tokens of the step (`histogram.py`),
so it does not depend on how they are divided, and their number need not be a multiple of E / K. The bias of a step is known before it: a token's
choice depends on no other token, in training too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.histogram import BINS, count_scores, quantile
from megatron.model.moe.routers.linear import ExactBuffers, Jitter, RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class QuantileBalancingRouter(nn.Module):
    """Weights are divided by their sum where `moe_normalize_top_k` says so, and multiplied by `moe_router_topk_scaling_factor`."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.balance = QuantileBias(moe.num_experts, moe.top_k, moe.moe_router_quantile_balancing_ema)
        self.top_k, self.normalize, self.scale = moe.top_k, moe.moe_normalize_top_k, moe.moe_router_topk_scaling_factor
        self.scores_width = moe.num_experts * BINS

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token. In training, with the counts that move the bias."""
        logit_TE = self.layer(self.jitter(x_TD))
        probability_TE = logit_TE.softmax(-1)
        preference_TE = self.balance(logit_TE.detach())
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        weight_TK = probability_TE.gather(1, expert_TK)
        if self.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
        scores_C = self.balance.count(logit_TE.detach(), preference_TE) if self.training else None
        return Routing(expert_TK, self.scale * weight_TK, probability_TE, logit_TE, scores_C=scores_C)


class QuantileBias(ExactBuffers):
    """The bias b. It is a buffer, saved with the model. `ema`: the share of the old bias that stays at every step (0: none)."""

    def __init__(self, num_experts: int, top_k: int, ema: float) -> None:
        super().__init__()
        self.top_k, self.ema, self.share = top_k, ema, top_k / num_experts
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    bias: Tensor

    def forward(self, logit_TE: Tensor) -> Tensor:
        """logit_TE + bias_E."""
        return logit_TE + self.bias.to(logit_TE.dtype)

    def count(self, logit_TE: Tensor, preference_TE: Tensor) -> Tensor:
        """scores_C: of the logits above a_t, the token's first preference that is not chosen."""
        next_T1 = preference_TE.topk(self.top_k + 1, dim=-1).values[:, -1:]
        return count_scores(logit_TE - next_T1, -self.bias)

    @torch.no_grad()
    def update_from_scores(self, scores_C: Tensor) -> None:
        """The bias for the next step, from the counts of a whole step over all processes. Without any token it stays."""
        if not scores_C.any():
            return
        price_E = quantile(scores_C, -self.bias.to(scores_C.device), self.share)
        bias_E = self.ema * self.bias.double() - (1 - self.ema) * price_E.to(self.bias.device)
        self.bias.copy_(bias_E - bias_E.mean())
