"""Routing in C++ on CPUs (`csrc/route`): the softmax, the choice, the weights, the counts and the order in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.compiled import DTYPES, addresses, built, threads_for
from megatron.kernels.permute import Order
from megatron.kernels.route.interface import Gradients, Routed, Saved, Selection
from megatron.kernels.route.reference import refuse_choice, refuse_not_a_number

ROW_WORK = 16  # a number of a row costs about as much as as many copied bytes


class Compiled:
    """One pass over the logits in each direction."""

    def __init__(self) -> None:
        self.built = built()

    def forward(self, logit_NC: Tensor, rows_P: Tensor | None, selection: Selection, *, allow_nan: bool) -> Routed:
        """The decision."""
        (rows, candidates), top_k = logit_NC.shape, selection.top_k
        logit_NC = logit_NC.contiguous()
        rows_P = None if rows_P is None else rows_P.contiguous()
        new, parents = logit_NC.new_empty, 1 if rows_P is None else len(rows_P)
        numbers = new(rows, top_k), new(rows, candidates), new(rows), new(parents, candidates), new(())
        weight_NK, probability_NC, logsumexp_N, total_PC, entropy = numbers
        choice_NK = torch.empty(rows, top_k, dtype=torch.int64)
        order = Order(torch.empty(rows * top_k, dtype=torch.int64), torch.empty_like(choice_NK), torch.empty(parents * candidates, dtype=torch.int64))
        given = addresses(logit_NC, rows_P, weight_NK, choice_NK, *numbers[1:], *order)
        lost = self.built.route(given, [rows, candidates, top_k, parents], *self.options(logit_NC, selection))
        if not allow_nan:
            refuse_not_a_number(lost, rows)
        return Routed(weight_NK, choice_NK, probability_NC, logsumexp_N, total_PC, entropy, order)

    def backward(self, grads: Gradients, saved: Saved, selection: Selection) -> Tensor:
        """grad_logit_NC."""
        probability_NC, choice_NK, rows_P = (t if t is None else t.contiguous() for t in saved)
        assert probability_NC is not None
        assert choice_NK is not None
        (rows, candidates), top_k = probability_NC.shape, choice_NK.shape[1]
        contiguous = [t if t is None else t.contiguous() for t in grads]
        grad_NC = torch.empty_like(probability_NC)
        given = addresses(*contiguous, probability_NC, choice_NK, rows_P, grad_NC)
        sizes = [rows, candidates, top_k, 1 if rows_P is None else len(rows_P)]
        self.built.route_backward(given, sizes, *self.options(probability_NC, selection))
        return grad_NC

    def statistics(self, choice_TK: Tensor, num_experts: int, length: int) -> Tensor:
        """Neighbours are compared as they are, without a table of tokens by experts."""
        choice_TK = choice_TK.contiguous()
        tokens, top_k = choice_TK.shape
        changed, used = self.built.choice_statistics(choice_TK.data_ptr(), [tokens, top_k, num_experts, length])
        if changed < 0:
            refuse_choice(num_experts)
        replaced = (changed // 2) / max(1.0, used / length * (length - 1))
        return torch.tensor([replaced, used / max(1, tokens)], dtype=torch.float64)

    def options(self, like: Tensor, selection: Selection) -> tuple[float, bool, int, int]:
        """The last arguments of both calls."""
        return selection.scale, selection.normalize, DTYPES[like.dtype], threads_for(ROW_WORK * like.numel())
