"""SMoE-Dropout: a random router that is never trained, and more experts per token as the training goes on (Chen et al., 2023, arXiv 2303.01610).

Shapes: T tokens; D model width; E experts; K = `moe_top_k` places per token; k experts per token now.

    experts = the k largest of x W with W random and fixed;  weight = softmax over these k logits
    k = k_0 + round((K - k_0) * done):  done the part of the training steps (of the steps in `moe_router_growth`) that is done
The formula of k and the softmax over the chosen logits are those of the authors' code (VITA-Group/Random-MoE-as-Dropout, `linear_increase`). Their
script for enwik8 goes from 8 to all 16 experts; give `moe_router_start_k` and a `moe_top_k` of all experts to do the same.

Our choices: W is drawn as other routers are (`init_method`), has no bias, and is a buffer: it is saved, and no optimizer sees it. k is a buffer too.
So a checkpoint or an export generates text with the k at which it was saved. `moe_router_eval_k` sets another one wherever the model does not train,
because a model that was trained like this also computes with fewer experts. No loss balances the load, for W does not learn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Fill, Initializer
from megatron.model.moe.routers.linear import Jitter, logits
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class FixedRouterLinear(nn.Module):
    """Logits of every expert with weights that are drawn once."""

    weight: Tensor

    def __init__(self, width: int, num_experts: int, fill: Fill) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(num_experts, width))
        fill(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logit_TE, in float32 (float64 for float64)."""
        return logits(x_TD, self.weight)


class Growth(nn.Module):
    """k, the number of experts per token, as a function of the training's progress."""

    k: Tensor

    def __init__(self, moe: MoEConfig) -> None:
        super().__init__()
        self.start, self.end, self.span = moe.moe_router_start_k, moe.top_k, moe.moe_router_growth
        self.register_buffer("k", torch.tensor(min(self.start, self.end)))

    def update(self, done: float) -> None:
        """Sets k for the next step. `done`: the part of the training steps that is done, 0 to 1."""
        self.k.fill_(grown(done, start=self.start, end=self.end, span=self.span))


class SMoEDropoutRouter(nn.Module):
    """Places beyond the k-th are empty."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = FixedRouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.growth = Growth(moe)
        self.num_experts, self.places, self.eval_k = moe.num_experts, moe.top_k, moe.moe_router_eval_k

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token."""
        logit_TE = self.layer(self.jitter(x_TD))
        chosen_TK, expert_TK = logit_TE.topk(self.places, dim=-1)
        unused_K = torch.arange(self.places, device=x_TD.device) >= self.chosen
        weight_TK = chosen_TK.masked_fill(unused_K, -torch.inf).softmax(-1)
        return Routing(expert_TK.masked_fill(unused_K, self.num_experts), weight_TK, logit_TE.softmax(-1), logit_TE, padded=True)

    @property
    def chosen(self) -> Tensor | int:
        """k: in training that of the step, elsewhere `moe_router_eval_k` where it is given."""
        return self.growth.k if self.training or self.eval_k is None else self.eval_k


def grown(done: float, *, start: int, end: int, span: list[float]) -> int:
    """k when this part of the training steps (0 to 1) is done; it grows while `done` is between the two numbers of `span`."""
    first, last = span
    part = 1.0 if done >= last else (done - first) / (last - first) if done > first else 0.0
    return min(start, end) + math.floor((end - min(start, end)) * part + 0.5)
