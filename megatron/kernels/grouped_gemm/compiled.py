"""Grouped matrix products by csrc/grouped_gemm: packed weights, blocks of columns, all experts in one parallel region."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.compiled import DTYPES, address, built, counts, serves
from megatron.kernels.grouped_gemm.reference import Reference


def one_product(x_RD: Tensor, rows_E: Tensor) -> bool:
    """Whether this is an ordinary matrix product, for which PyTorch's library is faster. Its 16-bit products are not on every processor."""
    return rows_E.numel() == 1 and x_RD.dtype != torch.bfloat16


class Compiled:
    """The op's two products. A format that csrc lacks (float16) is the reference's, and so is a single group."""

    def __init__(self) -> None:
        self.built = built()
        self.reference = Reference()

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF."""
        if one_product(x_RD, rows_E) or not serves(x_RD, weight_EDF):
            return self.reference.matmul(x_RD, weight_EDF, rows_E, transposed=transposed)
        if not weight_EDF.is_contiguous() and weight_EDF.mT.is_contiguous():  # a view turned by the caller
            weight_EDF, transposed = weight_EDF.mT, not transposed
        x_RD, weight_EDF, rows_E = x_RD.contiguous(), weight_EDF.contiguous(), counts(rows_E)
        experts, width = weight_EDF.shape[0], weight_EDF.shape[1 if transposed else 2]
        y_RF = x_RD.new_empty(x_RD.shape[0], width)
        sizes = [experts, *x_RD.shape, width]
        addresses = [address(t) for t in (y_RF, x_RD, weight_EDF, rows_E)]
        self.built.grouped_matmul(*addresses, sizes, transposed, DTYPES[x_RD.dtype], torch.get_num_threads())
        return y_RF

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF."""
        if one_product(x_RD, rows_E) or not serves(x_RD, y_RF):
            return self.reference.outer(x_RD, y_RF, rows_E)
        x_RD, y_RF, rows_E = x_RD.contiguous(), y_RF.contiguous(), counts(rows_E)
        out_EDF = x_RD.new_empty(rows_E.shape[0], x_RD.shape[1], y_RF.shape[1])
        sizes = [rows_E.shape[0], *x_RD.shape, y_RF.shape[1]]
        addresses = [address(t) for t in (out_EDF, x_RD, y_RF, rows_E)]
        self.built.grouped_outer(*addresses, sizes, DTYPES[x_RD.dtype], torch.get_num_threads())
        return out_EDF
