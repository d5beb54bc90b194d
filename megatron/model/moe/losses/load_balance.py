"""The load-balancing loss of Switch Transformers (Fedus et al., 2021, equations 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.moe.routing import LossContext, Routing


def load_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """E * sum_e f_e P_e: f the share of choices that expert e got (no gradient), P its mean probability. 1 when uniform, E when all go to one."""
    choices = routing.expert_TK.reshape(-1)
    count_E = torch.bincount(choices, minlength=context.num_experts)
    probability_E = routing.probability_TE.mean(0)
    return context.num_experts * torch.dot(count_E.to(probability_E.dtype) / max(1, len(choices)), probability_E)
