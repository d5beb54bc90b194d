"""Auxiliary losses of StructMoE models.

Shapes: B batch; S sequence; T tokens; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .moe_structmoe import Decision, StructMoERouter


def sequence_load_balance_loss(decision: Decision) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformers, equations 4 to 6) within each sequence, averaged over sequences (DeepSeek-V2)."""
    counts_BS1 = decision.counts_BS[:, :, None]
    chosen_BE, probability_BE = ((part.view(*counts_BS1.shape[:2], -1) * counts_BS1).sum(1) for part in (decision.chosen_TE, decision.probability_TE))
    share_BE = chosen_BE / chosen_BE.sum(-1, keepdim=True).clamp(min=1)
    return share_BE.shape[1] * (share_BE * probability_BE / counts_BS1.sum(1).clamp(min=1)).sum(-1).mean()


def load_balance_loss(decision: Decision) -> Tensor:
    """The same over all tokens of the batch."""
    return sequence_load_balance_loss(decision._replace(counts_BS=decision.counts_BS.reshape(1, -1)))


def heterogeneous_load_balance_loss(decision: Decision) -> Tensor:
    """The same with tau times the weight for zero, copy and constant experts (MoE++, equation 7)."""
    counts_T1 = decision.counts_BS.flatten()[:, None]
    chosen_E, probability_E = ((part * counts_T1).sum(0) for part in (decision.chosen_TE, decision.probability_TE))
    share_E = chosen_E / chosen_E.sum().clamp(min=1)
    return len(share_E) * (decision.eta_E * share_E * probability_E / counts_T1.sum().clamp(min=1)).sum()


def z_loss(decision: Decision) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, equation 5)."""
    return decision.over_tokens(decision.logit_TE.logsumexp(-1).square())


def entropy_loss(decision: Decision) -> Tensor:
    """Mean entropy of the probabilities, in nats (Huang et al., 2024, equation 6)."""
    smallest = torch.finfo(decision.probability_TE.dtype).tiny
    return decision.over_tokens(-(decision.probability_TE * decision.probability_TE.clamp(min=smallest).log()).sum(-1))


def block_wise_selection_loss(decision: Decision) -> Tensor:
    """Consecutive tokens should use the same experts (CoSMoEs, equations 2 to 7): the share of experts replaced times how far weights move."""
    counts_BS = decision.counts_BS
    pairs_BS1 = (counts_BS[:, 1:] * counts_BS[:, :-1])[:, :, None]
    weight_TE = (decision.temperature * decision.logit_TE).softmax(-1)
    moved, replaced = ((x.view(*counts_BS.shape, -1).diff(dim=1).abs() * pairs_BS1).sum() for x in (weight_TE, decision.chosen_TE))
    places = decision.over_tokens(decision.chosen_TE.sum(-1)) * pairs_BS1.sum()
    return (replaced / 2).floor() / places.clamp(min=1) * moved / counts_BS.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Decision], Tensor]] = {
    "load_balance": load_balance_loss,
    "global_load_balance": load_balance_loss,  # over the batch of this process alone
    "sequence_load_balance": sequence_load_balance_loss,
    "heterogeneous_load_balance": heterogeneous_load_balance_loss,
    "z_loss": z_loss,
    "entropy": entropy_loss,
    "block_wise_selection": block_wise_selection_loss,
}
"""The auxiliary losses of one layer that are computed here: all but lore_balance and neighbour_selection."""


JOINT = "joint_load_balance"


def joint_load_balance_loss(decisions: Sequence[Decision]) -> Tensor:
    """E * sum_e F_e P_e: F_e how often a token uses expert e, P_e its probability; means over all layers' tokens (as in transformers' models)."""
    uses, probabilities = [], []
    for decision in decisions:
        share_T = decision.counts_BS.flatten().to(decision.chosen_TE) / decision.counts_BS.sum().clamp(min=1)
        uses.append((share_T @ decision.chosen_TE).to(decisions[0].logit_TE.device))
        probabilities.append((share_T @ decision.probability_TE).to(decisions[0].logit_TE.device))
    uses_E, probability_E = torch.stack(uses).mean(0), torch.stack(probabilities).mean(0)
    return len(uses_E) * (uses_E * probability_E).sum()


def auxiliary_loss(
    routers: Sequence[StructMoERouter], router_logits: Sequence[Tensor], counts_BS: Tensor, coefficients: Mapping[str, float]
) -> Tensor:
    """The losses times their coefficients, summed over the layers; `counts_BS` is 0 for padding. One that is not computed here is left out."""
    total = counts_BS.new_zeros(())
    decisions = [router.decision(logit_TE, counts_BS.to(logit_TE.device)) for router, logit_TE in zip(routers, router_logits, strict=True)]
    for name in coefficients.keys() & LOSSES.keys():
        for decision in decisions:
            total = total + coefficients[name] * LOSSES[name](decision).to(total)
    if JOINT in coefficients:
        total = total + coefficients[JOINT] * joint_load_balance_loss(decisions).to(total)
    return total
