"""The K experts of the largest logits, weighted by a softmax (Shazeer et al., 2017).

Shapes: T tokens; D model width; E experts; K experts per token.

    softmax over all experts, then the K largest: Switch Transformers (K = 1), GPT-NeoX's `topk`; OLMoE and Qwen-MoE.
    softmax over the K largest logits alone:      Mixtral's Softmax(TopK(x W)), the same as the first with its weights divided by their sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron.kernels.route import Selection, route
from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import Jitter, RouterLinear
from megatron.model.moe.routing import Routing, Softmax

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class TopKRouter(nn.Module):
    """The weights are the chosen experts' probabilities, divided by their sum only where `moe_normalize_top_k` says so."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        normalize = moe.moe_normalize_top_k or not moe.moe_router_pre_softmax
        self.selection = Selection(moe.top_k, normalize, moe.moe_router_topk_scaling_factor)
        self.backend = moe.kernel_backends.get("route", "auto")

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing of each token; in training the input is jittered where `moe_jitter_eps` is given."""
        logit_TE = self.layer(self.jitter(x_TD))
        routed = route(logit_TE, self.selection, allow_nan=True, backend=self.backend)
        softmax = Softmax(routed.logsumexp_N, routed.total_PC[0], routed.entropy, routed.order)
        return Routing(routed.choice_NK, routed.weight_NK, routed.probability_NC, logit_TE, softmax=softmax)
