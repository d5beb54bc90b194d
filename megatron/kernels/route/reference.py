"""Routing by PyTorch's own functions: any device; the definition that the others are tested against. Shapes as in the package's docstring."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.permute import Order
from megatron.kernels.permute.reference import Reference as Permutation
from megatron.kernels.permute.reference import outside
from megatron.kernels.route.interface import Gradients, Routed, Saved, Selection


def refuse_not_a_number(rows: int, total: int) -> None:
    """Raises ValueError where `rows` rows have no probabilities."""
    if rows:
        raise ValueError(
            f"route: {rows} of {total} rows have no probabilities, because a logit is NaN or +inf, or all are -inf; "
            "look for what made the router's input or weights not finite, or pass allow_nan=True"
        )


def check_rows(rows_P: Tensor, total: int) -> None:
    """Raises ValueError where the counts cannot be those of `total` rows."""
    rows = rows_P.tolist()  # PyTorch's own sum of huge counts could wrap around
    if sum(rows) != total or any(count < 0 for count in rows):
        raise ValueError(f"route: row counts {rows} for {total} rows; they must not be negative and must sum to the number of rows")


def refuse_choice(num_experts: int) -> None:
    """Raises the ValueError for a choice out of range."""
    raise ValueError(f"choice_statistics: a choice is not 0 to {num_experts - 1}, or {num_experts} for an empty place")


class Reference:
    """One function after the other."""

    def forward(self, logit_NC: Tensor, rows_P: Tensor | None, selection: Selection, *, allow_nan: bool) -> Routed:
        """The decision."""
        if rows_P is not None and logit_NC.device.type == "cpu":
            check_rows(rows_P, logit_NC.shape[0])
        probability_NC = logit_NC.softmax(-1)
        lost_N = probability_NC.isnan().any(-1)
        if not allow_nan:
            refuse_not_a_number(int(lost_N.sum()), len(lost_N))
        choice_NK = logit_NC.sort(dim=-1, descending=True, stable=True).indices[:, : selection.top_k].contiguous()
        weight_NK = probability_NC.gather(1, choice_NK)
        if selection.normalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        weight_NK = selection.scale * weight_NK
        logsumexp_N = logit_NC.logsumexp(-1).masked_fill(lost_N, torch.nan)
        key_NK = choice_NK if rows_P is None else choice_NK + logit_NC.shape[1] * parents(rows_P, logit_NC.shape[0])[:, None]
        groups = logit_NC.shape[1] * (1 if rows_P is None else len(rows_P))
        order = Order(*Permutation().sort(key_NK, groups, padded=False))
        return Routed(weight_NK, choice_NK, probability_NC, logsumexp_N, totals(probability_NC, rows_P), mean_entropy(probability_NC), order)

    def backward(self, grads: Gradients, saved: Saved, selection: Selection) -> Tensor:
        """dp = grad of p + grad of its totals + what the weights pass on; grad of logit = p * (dp - sum of dp * p + grad of logsumexp)."""
        probability_NC, choice_NK, rows_P = saved
        d_probability_NC = torch.zeros_like(probability_NC) if grads.probability_NC is None else grads.probability_NC.clone()
        if grads.total_PC is not None:
            d_probability_NC += grads.total_PC if rows_P is None else grads.total_PC[parents(rows_P, probability_NC.shape[0])]
        if grads.weight_NK is not None:
            d_chosen_NK = selection.scale * grads.weight_NK
            if selection.normalize:
                chosen_NK = probability_NC.gather(1, choice_NK)
                total_N1 = chosen_NK.sum(-1, keepdim=True)
                d_chosen_NK = (d_chosen_NK - (d_chosen_NK * chosen_NK).sum(-1, keepdim=True) / total_N1) / total_N1
            d_probability_NC.scatter_add_(1, choice_NK, d_chosen_NK)
        shift_N1 = (d_probability_NC * probability_NC).sum(-1, keepdim=True)
        if grads.logsumexp_N is not None:
            shift_N1 = shift_N1 - grads.logsumexp_N[:, None]
        return probability_NC * (d_probability_NC - shift_N1)

    def statistics(self, choice_TK: Tensor, num_experts: int, length: int) -> Tensor:
        """Neighbours are compared over a table of which token uses which expert."""
        if outside(choice_TK, num_experts + 1) is not None:
            refuse_choice(num_experts)
        chosen_TE = choice_TK.new_zeros(choice_TK.shape[0], num_experts + 1).scatter_(1, choice_TK, 1)[:, :num_experts]
        chosen_BSE = chosen_TE.reshape(-1, length, num_experts)
        used = chosen_TE.sum().double()
        replaced = (chosen_BSE.diff(dim=1).abs().sum() // 2) / (used / length * (length - 1)).clamp(min=1)
        return torch.stack([replaced, used / max(1, choice_TK.shape[0])])


def parents(rows_P: Tensor, rows: int) -> Tensor:
    """parent_N of each row."""
    return torch.arange(len(rows_P), device=rows_P.device).repeat_interleave(rows_P, output_size=rows)


def totals(probability_NC: Tensor, rows_P: Tensor | None) -> Tensor:
    """total_PC, as a product with a table of which row is whose: the same on every run, on a GPU too."""
    if rows_P is None:
        return probability_NC.sum(0, keepdim=True)
    parent_N = parents(rows_P, probability_NC.shape[0])
    own_PN = (torch.arange(len(rows_P), device=rows_P.device)[:, None] == parent_N).to(probability_NC.dtype)
    return own_PN @ probability_NC


def mean_entropy(probability_NC: Tensor) -> Tensor:
    """Over the rows, in nats; a vanished probability counts 0."""
    smallest = torch.finfo(probability_NC.dtype).tiny
    return -(probability_NC * probability_NC.clamp(min=smallest).log()).sum() / max(1, probability_NC.shape[0])
