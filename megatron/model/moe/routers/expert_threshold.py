"""Expert Threshold routing: an expert takes every token whose score exceeds the expert's running threshold (Sun et al., 2026, arXiv 2603.11535).

Shapes: T tokens; D model width; E experts; K = E places per token; C counts of scores.

    choice = the experts with logit_te > c_e;    weight = sigmoid(logit_te)
    after a step:  q_e = the value that logit_te exceeds for T K' / E tokens, K' = `moe_top_k`;    c_e = EMA of the q_e of the steps so far
It is expert choice made causal: in the long run an expert takes the same share of the tokens, but which tokens does not depend on the others in the
batch, in training and in generation alike. There is no balance loss. A token takes as many experts as want it, also none; then it passes through the
residual stream alone.

The abstract gives the rule and the average. Left open, and chosen here: weights are sigmoids, because experts decide on their own (a softmax would
make them depend on each other). The average has no bias towards its start: the first step's q is the first threshold, and after t steps the newest
counts (1 - d) / (1 - d^t) with d = `moe_router_threshold_decay`. Before the first step there is no threshold, and a token takes its K' best
experts: otherwise the first step would compute half of all experts for every token. q is taken over all tokens of a step (`histogram.py`), those
that the expert did not take included, so an expert that got nothing gets its share back.
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


class ExpertThresholdRouter(nn.Module):
    """A token that no expert takes passes through the residual stream alone."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.balance = Thresholds(moe.num_experts, moe.top_k, moe.moe_router_threshold_decay)
        self.num_experts, self.scores_width = moe.num_experts, moe.num_experts * BINS

    def forward(self, x_TD: Tensor) -> Routing:
        """Place e of a token holds expert e where e takes the token. `probability_TE` are the sigmoids, which need not sum to 1."""
        logit_TE = self.layer(self.jitter(x_TD))
        score_TE = logit_TE.sigmoid()
        chosen_TE = self.balance(logit_TE.detach())
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        expert_TE = torch.where(chosen_TE, expert_E, self.num_experts)
        scores_C = count_scores(logit_TE, self.balance.threshold) if self.training else None
        return Routing(expert_TE, score_TE * chosen_TE, score_TE, logit_TE, padded=True, scores_C=scores_C)


class Thresholds(ExactBuffers):
    """The thresholds c, and how many steps they are the average of. Both are buffers, saved with the model."""

    def __init__(self, num_experts: int, mean_experts: int, decay: float) -> None:
        super().__init__()
        self.mean_experts, self.decay, self.share = mean_experts, decay, mean_experts / num_experts
        self.register_buffer("threshold", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float32))

    threshold: Tensor
    steps: Tensor

    def forward(self, logit_TE: Tensor) -> Tensor:
        """bool chosen_TE."""
        best_TK = logit_TE.topk(self.mean_experts, dim=-1).indices
        best_TE = torch.zeros_like(logit_TE, dtype=torch.bool).scatter_(1, best_TK, True)
        return torch.where(self.steps > 0, logit_TE > self.threshold.to(logit_TE.dtype), best_TE)

    @torch.no_grad()
    def update_from_scores(self, scores_C: Tensor) -> None:
        """The thresholds for the next step, from the counts of a whole step over all processes. Without any token they stay."""
        if not scores_C.any():
            return
        self.steps += 1
        newest = (1 - self.decay) / (1 - self.decay ** float(self.steps))
        threshold_E = self.threshold.double().to(scores_C.device)
        moved_E = quantile(scores_C, threshold_E, self.share) - threshold_E
        self.threshold.copy_(threshold_E + newest * moved_E)
