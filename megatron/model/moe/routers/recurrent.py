"""RMoE's router: it remembers what the routers of the layers below saw of a token (Qiu et al., 2024, "Layerwise Recurrent Router", arXiv 2408.06793).

Shapes: T tokens; D model width; E experts; K experts per token; P width of the memory (`moe_router_rnn_hidden_size`).

    x' = W_in x  (its own in each layer);    h = GRU(x', h of the layer below)  (one GRU for all layers);    logits = W h
    choice = top K of softmax(logits);       weights = those probabilities
The recurrence goes from layer to layer and not along the text: a token's routing depends on that token's hidden states alone. The memory travels in
`LayerState`. The facts are the paper's equations 4 to 6 and the code at github.com/qiuzh20/RMoE (`llama_moe_rnn`). Its memory begins with zeros.
Here the first layer's is trained (`start`): with zeros its GRU would have gates that do nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.route import Selection, route
from megatron.model.initialization import Initializer, fill_each
from megatron.model.moe.routers.linear import Jitter, RouterLinear
from megatron.model.moe.routing import Routing, Softmax
from megatron.model.moe.surroundings import NOTHING_AROUND, Surroundings

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class RecurrentRouter(nn.Module):
    """Weights are divided by their sum where `moe_normalize_top_k` says so, and multiplied by `moe_router_topk_scaling_factor`."""

    looks_around = True
    decodes_alone = False

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        width = moe.moe_router_rnn_hidden_size
        self.into = RouterLinear(model.hidden_size, width, init.into)
        self.cell = RouterCell(width, init)
        self.layer = RouterLinear(width, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.selection = Selection(moe.top_k, moe.moe_normalize_top_k, moe.moe_router_topk_scaling_factor)
        self.backend = moe.kernel_backends.get("route", "auto")
        self._shared = (self.cell,)  # in a tuple: a module that is an attribute would be a part of this one too

    def follow(self, first: RecurrentRouter) -> None:
        """From now on this router uses the GRU of the first layer with experts, which alone keeps it."""
        self._shared = (first.cell,)
        del self.cell

    def forward(self, x_TD: Tensor, around: Surroundings = NOTHING_AROUND) -> Routing:
        """The routing of each token, and the memory for the next layer."""
        memory_TP = self._shared[0](self.into(self.jitter(x_TD)), around.memory_TP)
        logit_TE = self.layer(memory_TP)
        routed = route(logit_TE, self.selection, allow_nan=True, backend=self.backend)
        softmax = Softmax(routed.logsumexp_N, routed.total_PC[0], routed.entropy, routed.order)
        return Routing(routed.choice_NK, routed.weight_NK, routed.probability_NC, logit_TE, softmax=softmax, memory_TP=memory_TP)


class RouterCell(nn.Module):
    """A gated recurrent unit (Cho et al., 2014; the equations of torch.nn.GRUCell), in float32 (float64 for float64) whatever the model's dtype.

    r, z = sigmoid(W x + b + U h + c);    n = tanh(W_n x + b_n + r (U_n h + c_n));    h' = (1 - z) n + z h
    """

    def __init__(self, width: int, init: Initializer) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(3 * width, width))
        self.memory_weight = nn.Parameter(torch.empty(3 * width, width))
        self.input_bias = nn.Parameter(torch.zeros(3 * width))
        self.memory_bias = nn.Parameter(torch.zeros(3 * width))
        self.start = nn.Parameter(torch.empty(1, width))
        for matrix in (self.input_weight, self.memory_weight):
            fill_each(init.into, matrix.data, 3)
        init.into(self.start.data)

    def forward(self, x_TP: Tensor, memory_TP: Tensor | None) -> Tensor:
        """The memory after this layer, [T, P]. `memory_TP` None: this is the first layer with experts."""
        dtype = x_TP.dtype
        before_TP = self.start.to(dtype).expand_as(x_TP) if memory_TP is None else memory_TP.to(dtype)
        given = nn.functional.linear(x_TP, self.input_weight.to(dtype), self.input_bias.to(dtype)).chunk(3, dim=-1)
        kept = nn.functional.linear(before_TP, self.memory_weight.to(dtype), self.memory_bias.to(dtype)).chunk(3, dim=-1)
        reset_TP, update_TP = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
        new_TP = (given[2] + reset_TP * kept[2]).tanh()
        return (1 - update_TP) * new_TP + update_TP * before_TP
