"""EMO's router: all tokens of a document choose their experts from one pool (Wang et al., 2026, "Emergent Modularity", arXiv 2605.06663).

Shapes: B batch; S sequence; T = B*S tokens; D model width; E experts; K experts per token; P positions of a cache.

    p = softmax(logits);    pool of a document = the N experts with the largest sum of p over its tokens
    choice = top K of p within the pool;    weights = those p
In training N is drawn for each document and layer, evenly from `moe_min_document_expert_pool` to `moe_max_document_expert_pool`. The facts are
those of OLMo-core 3.0.0 (`nn/moe/emo.py`, `nn/moe/v2/emo_router.py`, `segment_ids_from_eos`). Use it with
`global_load_balance`: a balance within a micro-batch works against the pools.

Chosen here, where these leave a detail open or differ:
- N is a hash of the document's tokens and the layer and not a random number. So it is the same under accumulation, recomputation and every layout.
- Outside training all experts are allowed, as for the paper's full model. With `moe_eval_document_expert_pool` the pool of a token comes from the
  tokens of its document up to itself (OLMo-core: from the whole document), so generation with a cache and a forward over the whole text agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import Jitter, RouterLinear
from megatron.model.moe.routing import Routing
from megatron.model.moe.surroundings import NOTHING_AROUND, Documents, Surroundings

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

UNIT = 2**32
"""Probabilities are summed as whole numbers of 1/UNIT: their sum does not depend on an order, and a recomputation gets the same pool."""


class DocumentPoolRouter(nn.Module):
    """Weights are divided by their sum where `moe_normalize_top_k` says so, and multiplied by `moe_router_topk_scaling_factor`."""

    looks_around = True
    wants_documents = True

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.layer = RouterLinear(model.hidden_size, moe.num_experts, init.into)
        self.jitter = Jitter(moe.moe_jitter_eps)
        self.top_k, self.normalize, self.scale = moe.top_k, moe.moe_normalize_top_k, moe.moe_router_topk_scaling_factor
        self.smallest, self.largest, self.evaluated = moe.document_pools(moe.num_experts)
        self.decodes_alone = self.evaluated == moe.num_experts

    def forward(self, x_TD: Tensor, around: Surroundings = NOTHING_AROUND) -> Routing:
        """The routing of each token. Without documents all experts are allowed."""
        logit_TE = self.layer(self.jitter(x_TD))
        probability_TE = logit_TE.softmax(-1)
        preference_TE = probability_TE.detach()
        if around.documents is not None and (self.training or self.evaluated < logit_TE.shape[1]):
            preference_TE = preference_TE.masked_fill(~self._pool(preference_TE, around.documents, around), -1.0)
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        weight_TK = probability_TE.gather(1, expert_TK)
        if self.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
        return Routing(expert_TK, self.scale * weight_TK, probability_TE, logit_TE)

    @torch.no_grad()
    def _pool(self, probability_TE: Tensor, documents: Documents, around: Surroundings) -> Tensor:
        """bool TE: the experts that a token may choose."""
        units_BSE = (probability_TE.nan_to_num(0.0).double() * UNIT).round().long().unflatten(0, documents.number_BS.shape)
        if self.training:
            sum_BSE = documents.sums(units_BSE)
            size_BS = self.smallest + documents.drawn(around.layer) % (self.largest - self.smallest + 1)
        else:
            before_BE = None if around.cache is None else around.cache.sums_before(units_BSE)
            sum_BSE = documents.running_sums(units_BSE, before_BE)
            size_BS = torch.full_like(documents.number_BS, self.evaluated)
            if around.cache is not None:
                around.cache.keep_sums(sum_BSE)
        best_BSE = sum_BSE.argsort(dim=-1, descending=True, stable=True)
        rank_BSE = torch.empty_like(best_BSE).scatter_(-1, best_BSE, torch.arange(best_BSE.shape[-1], device=best_BSE.device).expand_as(best_BSE))
        return (rank_BSE < size_BS[..., None]).flatten(0, 1)
