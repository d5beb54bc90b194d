"""Row permutation in Triton. The sum over a token's choices is taken while they are read: there is no tensor of all choices.

An index out of range reads nothing and counts as zero on a GPU. `sort` is the reference's: PyTorch's radix sort, without a transfer.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.permute.reference import Reference, outside, refuse_index
from megatron.kernels.triton_kernels import rows as kernels
from megatron.kernels.triton_kernels.blocks import cdiv, launch
from megatron.kernels.triton_kernels.grouped import accumulator

ROWS, WIDTH = 4, 512
"""A tile of the kernels, in rows and columns."""


class Triton(Reference):
    """Gathers along the permutation and its inverse."""

    def gather(self, x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        """rows_RD[r] = x_TD[order_R[r] // top_k]."""
        (tokens, width), rows = x_TD.shape, len(order_R)
        _check("permute", order_R, tokens * top_k)
        out_RD = x_TD.new_empty(rows, width)
        launch(
            kernels.gather_kernel, (cdiv(rows, ROWS), cdiv(width, WIDTH)), x_TD.contiguous(), order_R.contiguous(), out_RD, rows, tokens, width,
            CHOICES=top_k, BR=ROWS, BD=WIDTH, num_warps=4,
        )  # fmt: skip
        return out_RD

    def combine(self, rows_RD: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """y_TD = sum over k of weight * the row at inverse."""
        (tokens, top_k), (rows, width) = inverse_TK.shape, rows_RD.shape
        _check("combine", inverse_TK, rows + (rows < inverse_TK.numel()))
        out_TD = rows_RD.new_empty(tokens, width)
        weight = rows_RD if weight_TK is None else weight_TK.contiguous()
        launch(
            kernels.combine_kernel, (cdiv(tokens, ROWS), cdiv(width, WIDTH)),
            rows_RD.contiguous(), inverse_TK.contiguous(), weight, out_TD, rows, tokens, width,
            CHOICES=top_k, WEIGHTED=weight_TK is not None, BT=ROWS, BD=WIDTH, ACC=accumulator(rows_RD), num_warps=4,
        )  # fmt: skip
        return out_TD

    def combine_backward(self, grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of the weights, both computed in sorted order."""
        (tokens, top_k), (rows, width) = weight_TK.shape, rows_RD.shape
        _check("combine", order_R, weight_TK.numel())
        grad_rows = rows_RD.new_empty(rows, width)
        grad_weight = weight_TK.new_zeros(weight_TK.shape)
        launch(
            kernels.combine_backward_kernel, (cdiv(rows, ROWS),),
            grad_TD.contiguous(), rows_RD.contiguous(), order_R.contiguous(), weight_TK.contiguous(), grad_rows, grad_weight, rows, tokens, width,
            CHOICES=top_k, BR=ROWS, BD=WIDTH, ACC=accumulator(rows_RD), num_warps=4,
        )  # fmt: skip
        return grad_rows, grad_weight


def _check(what: str, index: Tensor, end: int) -> None:
    if (wrong := outside(index, end)) is not None:
        refuse_index(what, wrong, end)
