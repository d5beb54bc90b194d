"""The dynamic loss of top-p routing (Huang et al., 2024, "Harder Tasks Need More Experts", equation 6): low entropy, so that few experts suffice.

Shapes: T tokens; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.moe.losses.load_balance import normalized
from megatron.model.moe.routing import LossContext, Routing


def router_entropy_loss(routing: Routing, context: LossContext) -> Tensor:
    """Mean over tokens of -sum_e P_e log P_e, in nats."""
    return token_entropy(routing).mean()


def token_entropy(routing: Routing) -> Tensor:
    """entropy_T. A vanished probability counts 0, and its gradient is finite."""
    probability_TE = normalized(routing.probability_TE)
    smallest = torch.finfo(probability_TE.dtype).tiny
    return -(probability_TE * probability_TE.clamp(min=smallest).log()).sum(-1)
