"""Selection by neighbours: the router of a token should expect the experts of the tokens beside it.

Shapes: B batch; S sequence; T = B*S tokens; E experts; K experts per token.

    W = softmax(tau R)
    loss = - sum_b sum_t sum_e ( C[b,t,e] log W[b,t+1,e] + C[b,t+1,e] log W[b,t,e] ) / (2 B K (S - 1))

C[b,t,e] is 1 where token t uses expert e (no gradient). It is the cross entropy of a token's router with the choices of its neighbours. Its aim is
that of `block_wise_selection`. But equal logits do not lower it: they cost log E, and a router that sends neighbours to the same experts costs log K.
A sequence of one token has no neighbours: the loss is 0 there.
"""

from __future__ import annotations

from torch import Tensor

from megatron.model.moe.losses.block_wise_selection import sequences
from megatron.model.moe.losses.load_balance import choices
from megatron.model.moe.routing import LossContext, Routing


def neighbour_selection_loss(routing: Routing, context: LossContext) -> Tensor:
    """Over the neighbours in every sequence; where tokens use different numbers of experts, all choices count alike.

    Raises ValueError for a routing without `batch_shape`.
    """
    batch, length = sequences(routing)
    log_BSE = (context.temperature * routing.logit_TE).log_softmax(-1).view(batch, length, -1)
    chosen_BSE = choices(routing, context.num_experts).view(batch, length, -1)
    earlier, later = chosen_BSE[:, :-1], chosen_BSE[:, 1:]
    total = (earlier * log_BSE[:, 1:]).sum() + (later * log_BSE[:, :-1]).sum()
    return -total / (earlier.sum() + later.sum()).clamp(min=1)
