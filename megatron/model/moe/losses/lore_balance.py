"""Balance among the LoREs of an expert: the Switch loss inside each expert, averaged over the routed rows.

Shapes: R routed rows, sorted by expert; E experts; M LoREs per expert; L LoREs per row; G = E*M.

    sum_e (R_e / R) * M * sum_m f_em P_em:  f_em the share of e's choices that LoRE m got (no gradient), P_em its mean probability over e's R_e rows.
1 when every expert uses its LoREs evenly, M when each uses one. StructMoE's authors leave it out (their section 4.1) and find LoREs balanced; it
is off unless `moe_losses` names it.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.route.reference import totals
from megatron.model.moe.losses.load_balance import shares
from megatron.model.moe.routing import LossContext, Routing


def lore_balance_loss(routing: Routing, context: LossContext) -> Tensor:
    """Raises ValueError where the experts have no routed LoREs."""
    lores, rows_E = context.lores, context.rows_E
    if lores is None or rows_E is None:
        raise ValueError("lore_balance: these experts have no routed LoREs to balance; take it out of moe_losses")
    per_expert = lores.probability_RM.shape[1]
    total_EM = totals(lores.probability_RM, rows_E) if lores.total_EM is None else lores.total_EM  # R_e * P_em
    share_EM = shares(lores.rows_G.view(-1, per_expert)).to(total_EM.dtype)
    return per_expert * (share_EM * total_EM).sum() / rows_E.sum().clamp(min=1)
