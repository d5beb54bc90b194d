"""Row permutation in C++ on CPUs (`csrc/permute`). Rows of 16 bits are summed in float32; dtypes that it has no sums for are the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.compiled import DTYPES, addresses, built, threads_for
from megatron.kernels.permute.reference import Reference, refuse_group, refuse_index

NONE_BAD = -1


class Compiled(Reference):
    """One pass over the rows in each direction."""

    def __init__(self) -> None:
        self.built = built()

    def sort(self, group_TK: Tensor, num_groups: int, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A counting sort."""
        group_TK = group_TK.contiguous()
        choices = group_TK.numel()
        order_N, inverse_TK, rows_G = group_TK.new_empty(choices), torch.empty_like(group_TK), group_TK.new_empty(num_groups)
        rows, wrong = self.built.sort_by_group(
            addresses(group_TK, order_N, inverse_TK, rows_G), [choices, num_groups], padded, threads_for(choices * 32)
        )
        if rows < 0:
            refuse_group(wrong, num_groups, padded=padded)
        return order_N[:rows] if padded else order_N, inverse_TK, rows_G

    def gather(self, x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        """rows_RD[r] = x_TD[order_R[r] // top_k]."""
        x_TD, order_R = x_TD.contiguous(), order_R.contiguous()
        (tokens, width), rows = x_TD.shape, order_R.shape[0]
        rows_RD = x_TD.new_empty(rows, width)
        row_bytes = width * x_TD.element_size()
        sizes = [tokens, top_k, rows, row_bytes]
        bad = self.built.gather_rows(addresses(x_TD, order_R, rows_RD), sizes, threads_for(2 * rows * row_bytes))
        if bad != NONE_BAD:
            refuse_index("permute", int(order_R[bad]), tokens * top_k)
        return rows_RD

    def combine(self, rows_RD: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """y_TD = sum over k of weight * the row at inverse."""
        if rows_RD.dtype not in DTYPES:
            return super().combine(rows_RD, inverse_TK, weight_TK)
        rows_RD, inverse_TK = rows_RD.contiguous(), inverse_TK.contiguous()
        if weight_TK is not None:
            weight_TK = weight_TK.to(sum_dtype(rows_RD)).contiguous()
        (tokens, top_k), (rows, width) = inverse_TK.shape, rows_RD.shape
        y_TD = rows_RD.new_empty(tokens, width)
        threads = threads_for((rows + tokens) * width * rows_RD.element_size())
        given = addresses(rows_RD, inverse_TK, weight_TK, y_TD)
        bad = self.built.combine_rows(given, [tokens, top_k, rows, width], DTYPES[rows_RD.dtype], threads)
        if bad != NONE_BAD:
            refuse_index("combine", int(inverse_TK.view(-1)[bad]), rows + (rows < tokens * top_k))
        return y_TD

    def combine_backward(self, grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients in one pass."""
        if rows_RD.dtype not in DTYPES or grad_TD.dtype != rows_RD.dtype:
            return super().combine_backward(grad_TD, rows_RD, order_R, weight_TK)
        grad_TD, rows_RD, order_R = grad_TD.contiguous(), rows_RD.contiguous(), order_R.contiguous()
        wide_TK = weight_TK.to(sum_dtype(rows_RD)).contiguous()
        (tokens, top_k), (rows, width) = weight_TK.shape, rows_RD.shape
        grad_RD, grad_weight_TK = torch.empty_like(rows_RD), torch.empty_like(wide_TK)
        threads = threads_for(3 * rows * width * rows_RD.element_size())
        given = addresses(grad_TD, rows_RD, order_R, wide_TK, grad_RD, grad_weight_TK)
        bad = self.built.combine_backward(given, [tokens, top_k, rows, width], DTYPES[rows_RD.dtype], threads)
        if bad != NONE_BAD:
            refuse_index("combine", int(order_R[bad]), tokens * top_k)
        return grad_RD, grad_weight_TK.to(weight_TK.dtype)


def sum_dtype(rows: Tensor) -> torch.dtype:
    """What rows are summed in."""
    return torch.promote_types(rows.dtype, torch.float32)
