"""Block-wise expert selection, BlES (CoSMoEs: Huber et al., 2025, equations 2 to 7): consecutive tokens should use the same experts.

Shapes: B batch; S sequence (the paper's T); T = B*S tokens; E experts; K experts per token.

    W = softmax(tau R)                                                                      (2)
    H = sum_e sum_b sum_t |(S[b,t+1] == e) - (S[b,t] == e)|                                 (4)
    H_norm = floor(H / 2) / (B K (S - 1))                                                   (5), no gradient
    L_norm = sum_b sum_t sum_e |W[b,t+1,e] - W[b,t,e]| / (B S)                              (6)
    loss = H_norm * L_norm                                                                  (7)

S are the experts that a token was sent to. For the router `topk` they are the top K of W, equation 3 (tau > 0 does not change their order); other
routers balance or limit the choice, and then what has to be loaded is what they chose. A sequence of one token has no successor: the loss is 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.route import choice_statistics
from megatron.model.moe.routing import LossContext, Routing


def block_wise_selection_loss(routing: Routing, context: LossContext) -> Tensor:
    """The product of hard replacements (a constant) and soft differences. Raises ValueError for a routing without `batch_shape`."""
    batch, length = sequences(routing)
    weight_BSE = (context.temperature * routing.logit_TE).softmax(-1).view(batch, length, -1)
    soft = weight_BSE.diff(dim=1).abs().sum() / (batch * length)
    return replacement_ratio(routing, context).to(soft.dtype) * soft


@torch.no_grad()
def replacement_ratio(routing: Routing, context: LossContext) -> Tensor:
    """H_norm, equations 4 and 5: the share of a token's experts that its predecessor did not use (ExRep is 100 times it).

    Where tokens use different numbers of experts, K is their mean over the tokens. Raises ValueError for a routing without `batch_shape`.
    """
    return choice_statistics(routing.expert_TK, context.num_experts, sequences(routing)[1])[0]


def sequences(routing: Routing) -> tuple[int, int]:
    """(B, S)."""
    if routing.batch_shape is None:
        raise ValueError("block_wise_selection: the routing has no batch_shape, so it is not known where a sequence ends")
    return routing.batch_shape
