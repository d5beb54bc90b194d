"""The K experts of the largest logits, weighted by a softmax (Shazeer et al., 2017).

Shapes: T tokens; D model width; E experts; K experts per token.

    softmax over all experts, then the K largest: Switch Transformers (K = 1), GPT-NeoX's `topk`; OLMoE and Qwen-MoE.
    softmax over the K largest logits alone:      Mixtral's Softmax(TopK(x W)), the same as the first with its weights divided by their sum.
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


class TopKRouter(nn.Module):
    """The weights are the chosen experts' probabilities, divided by their sum only where `moe_normalize_top_k` says so."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.top_k, self.normalize = moe.top_k, moe.moe_normalize_top_k or not moe.moe_router_pre_softmax
        self.scale = moe.moe_router_topk_scaling_factor

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token; in training the input is jittered where `moe_jitter_eps` is given."""
        logit_TE = self.layer(self.jitter(x_TD))
        probability_TE = logit_TE.softmax(-1)
        weight_TK, expert_TK = top_k(probability_TE, self.top_k, normalize=self.normalize)
        return Routing(expert_TK, self.scale * weight_TK, probability_TE, logit_TE)


def top_k(probability_TE: Tensor, count: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """(weights, choices) of the `count` largest of each row, largest first; `normalize` divides the weights by their sum."""
    weight_TK, choice_TK = probability_TE.topk(count, dim=-1)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK, choice_TK
