"""The router z-loss of ST-MoE (Zoph et al., 2022, equation 5): keeps router logits small."""

from __future__ import annotations

from torch import Tensor

from megatron.model.moe.routing import LossContext, Routing


def router_z_loss(routing: Routing, context: LossContext) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2."""
    logsumexp_T = routing.logit_TE.logsumexp(-1) if routing.softmax is None else routing.softmax.logsumexp_T
    return logsumexp_T.square().mean()
