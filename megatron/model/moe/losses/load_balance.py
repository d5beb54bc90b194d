"""The load-balancing loss of Switch Transformers (Fedus et al., 2021, equations 4 to 6), over three spans of tokens, and over all layers together.

Shapes: B batch; S sequence; T = B*S tokens; E experts; K experts per token; X MoE layers.

    E * sum_e f_e P_e:  f_e the share of choices that expert e got (no gradient), P_e its mean probability.
1 when both are uniform, E when all go to one expert. The probabilities of a token are divided by their sum where a router's do not sum to 1
(sigmoid scores: DeepSeek-V3, equations 17 to 20).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.moe.routing import LossContext, Routing


def load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """Over the tokens of the micro-batch."""
    mean_E = mean_probabilities(routing)
    return context.num_experts * torch.dot(shares(routing.rows_E(context.num_experts)).to(mean_E.dtype), mean_E)


def sequence_load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """Within each sequence, averaged over sequences (DeepSeek-V2, equations 23 to 25; what CoSMoEs pairs with block-wise selection).

    Raises ValueError for a routing that does not say where its sequences are.
    """
    if routing.batch_shape is None:
        raise ValueError("sequence_load_balance: the routing has no batch_shape, so it is not known where a sequence ends")
    batch, length = routing.batch_shape
    chosen_TE = choices(routing, context.num_experts)
    share_BE = shares(chosen_TE.view(batch, length, -1).sum(1))
    probability_BE = normalized(routing.probability_TE).view(batch, length, -1).mean(1)
    return context.num_experts * (share_BE.to(probability_BE.dtype) * probability_BE).sum(-1).mean()


def global_load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """f over all tokens of the step so far: of every process, and of the micro-batches before this one; P over this micro-batch.

    Qiu et al., 2025 ("Demons in the detail"): balance over the global batch leaves experts free to specialise within a sequence.
    """
    count_E, mean_E = context.sum_over_processes(routing.rows_E(context.num_experts)), mean_probabilities(routing)
    if context.earlier_rows_E is not None:
        count_E = count_E + context.earlier_rows_E
    return context.num_experts * torch.dot(shares(count_E).to(mean_E.dtype), mean_E)


def joint_load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """This layer's part of the loss of transformers' own models (`load_balancing_loss_func`), which is one sum over all layers:

        E * sum_e F_e P_e:  F_e the mean over tokens and layers of how often a token uses expert e (no gradient), P_e its mean probability there.

    K when both are uniform. The layers' shares add up to that sum: each one is the product up to its layer minus the product before it.
    """
    own_2E, earlier_2E = expert_usage(routing, context.num_experts), context.earlier_usage_2E
    through_2E = own_2E if earlier_2E is None else own_2E + earlier_2E
    added = torch.dot(*through_2E.unbind())
    if earlier_2E is not None:
        added = added - torch.dot(*earlier_2E.unbind())
    return context.num_experts / context.num_layers**2 * added


def expert_usage(routing: Routing, num_experts: int) -> Tensor:
    """usage_2E: how often a token uses each expert, without gradient, and each expert's probability; means over the tokens."""
    mean_E = mean_probabilities(routing)
    uses_E = routing.rows_E(num_experts).double() / max(1, routing.probability_TE.shape[0])
    return torch.stack([uses_E.to(mean_E.dtype), mean_E])


def mean_probabilities(routing: Routing) -> Tensor:
    """probability_E, the mean over the tokens. A softmax needs no division by its sum."""
    if routing.softmax is None:
        return normalized(routing.probability_TE).mean(0)
    return routing.softmax.total_E / routing.probability_TE.shape[0]


def choices(routing: Routing, num_experts: int) -> Tensor:
    """chosen_TE, int64: 1 where the token uses the expert."""
    chosen = routing.expert_TK.new_zeros(routing.expert_TK.shape[0], num_experts + 1)
    return chosen.scatter_(1, routing.expert_TK, 1)[:, :num_experts]


def shares(count: Tensor) -> Tensor:
    """Counts along the last dimension divided by their sum; zero where there are none."""
    return count.double() / count.sum(-1, keepdim=True).clamp(min=1)


def normalized(probability_TE: Tensor) -> Tensor:
    """Each token's probabilities divided by their sum, so that scores of other kinds count alike."""
    total_T1 = probability_TE.sum(-1, keepdim=True)
    return probability_TE / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
