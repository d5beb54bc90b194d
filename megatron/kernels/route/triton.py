"""Routing in Triton: float32; float64 and very many candidates by the reference. Sorting is PyTorch's radix sort, sums are PyTorch's.

Shapes as in the package's docstring. Only the check without `allow_nan` waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.permute import Order
from megatron.kernels.permute.reference import Reference as Permutation
from megatron.kernels.route.interface import Gradients, Routed, Saved, Selection
from megatron.kernels.route.reference import Reference, check_rows, refuse_not_a_number
from megatron.kernels.triton_kernels import routing as kernels
from megatron.kernels.triton_kernels.blocks import cdiv, launch
from megatron.kernels.triton_kernels.schedule import bounds, check_counts

MOST_CANDIDATES = 2048
"""A program holds all of a row."""
TILE = 512
"""Numbers of a program. A row may have more."""


class Triton(Reference):
    """The decision and its gradient; statistics are those of the reference."""

    def forward(self, logit_NC: Tensor, rows_P: Tensor | None, selection: Selection, *, allow_nan: bool) -> Routed:
        """The decision."""
        (rows, candidates), top_k = logit_NC.shape, selection.top_k
        if not _fits(logit_NC):
            return super().forward(logit_NC, rows_P, selection, allow_nan=allow_nan)
        parent_N, new = _parents(logit_NC, rows_P), logit_NC.new_empty
        choice_NK, key_NK = (torch.empty(rows, top_k, dtype=torch.int64, device=logit_NC.device) for _ in range(2))
        weight_NK, probability_NC, logsumexp_N, entropy_N = new(rows, top_k), new(rows, candidates), new(rows), new(rows)
        columns = _power(candidates)
        tall = max(1, TILE // columns)
        launch(
            kernels.route_kernel, (cdiv(rows, tall),),
            logit_NC.contiguous(), parent_N, weight_NK, choice_NK, key_NK, probability_NC, logsumexp_N, entropy_N, rows, candidates, selection.scale,
            K=top_k, NORMALIZE=selection.normalize, BR=tall, BC=columns, BK=_power(top_k), num_warps=4,
        )  # fmt: skip
        if not allow_nan:
            refuse_not_a_number(int(logsumexp_N.isnan().sum()), rows)
        parents = 1 if rows_P is None else len(rows_P)
        order = Order(*Permutation().sort(key_NK, parents * candidates, padded=False))
        entropy = entropy_N.sum() / max(1, rows)
        return Routed(weight_NK, choice_NK, probability_NC, logsumexp_N, _totals(probability_NC, parent_N, parents), entropy, order)

    def backward(self, grads: Gradients, saved: Saved, selection: Selection) -> Tensor:
        """grad_logit_NC."""
        probability_NC, choice_NK, rows_P = saved
        (rows, candidates), top_k = probability_NC.shape, choice_NK.shape[1]
        if not _fits(probability_NC):
            return super().backward(grads, saved, selection)
        given = [probability_NC if grad is None else grad.contiguous() for grad in grads]  # what is absent is not read
        grad_NC = torch.empty_like(probability_NC, memory_format=torch.contiguous_format)
        columns = _power(candidates)
        tall = max(1, TILE // columns)
        launch(
            kernels.route_backward_kernel, (cdiv(rows, tall),),
            *given, probability_NC.contiguous(), choice_NK.contiguous(), _parents(probability_NC, rows_P), grad_NC,
            rows, candidates, 1 if rows_P is None else len(rows_P), selection.scale,
            K=top_k, NORMALIZE=selection.normalize, WEIGHT=grads.weight_NK is not None, PROBABILITY=grads.probability_NC is not None,
            LOGSUMEXP=grads.logsumexp_N is not None, TOTAL=grads.total_PC is not None, BR=tall, BC=columns, num_warps=4,
        )  # fmt: skip
        return grad_NC


def _fits(numbers_NC: Tensor) -> bool:
    return numbers_NC.dtype == torch.float32 and numbers_NC.shape[1] <= MOST_CANDIDATES


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _parents(like_NC: Tensor, rows_P: Tensor | None) -> Tensor:
    """int64 [N]: the parent of each row."""
    rows = like_NC.shape[0]
    if rows_P is None:
        return torch.zeros(rows, dtype=torch.int64, device=like_NC.device)
    if rows_P.device.type == "cpu":
        check_rows(rows_P, rows)
    check_counts(rows_P, rows)
    return torch.searchsorted(bounds(rows_P, rows)[1:], torch.arange(rows, device=rows_P.device), right=True)


def _totals(probability_NC: Tensor, parent_N: Tensor, parents: int) -> Tensor:
    """total_PC, in an order that is the same on every run."""
    if parents == 1:
        return probability_NC.sum(0, keepdim=True)
    own_PN = (torch.arange(parents, device=parent_N.device)[:, None] == parent_N).to(probability_NC.dtype)
    return own_PN @ probability_NC
