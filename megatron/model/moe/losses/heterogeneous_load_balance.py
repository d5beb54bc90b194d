"""Balance among experts that cost and experts that do not (MoE++: Jin et al., 2024, equation 7).

    E * sum_e eta_e f_e P_e:  eta = 1 for experts with weights, tau (`moe_zero_computation_balance`) for zero, copy and constant ones
f is an expert's share of the choices (no gradient), P its mean probability, E the number of all experts. The factor E is ours, where the paper leaves
the scale to the coefficient: the loss equals `load_balance` for tau = 1. With tau below 1 the loss is smallest if the cheap experts get more tokens
than the others, in the ratio 1/tau : 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.moe.losses.load_balance import mean_probabilities, shares
from megatron.model.moe.routing import LossContext, Routing


def heterogeneous_load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """Over the tokens of the micro-batch."""
    mean_E = mean_probabilities(routing)
    cheap_E = torch.arange(context.num_experts, device=mean_E.device) >= context.num_experts - context.num_zero_computation
    eta_E = torch.ones_like(mean_E).masked_fill(cheap_E, context.zero_computation_balance)
    return context.num_experts * torch.dot(shares(routing.rows_E(context.num_experts)).to(mean_E.dtype), eta_E * mean_E)
