"""Grouped matrix product in Triton: one launch for all experts, and the host never waits for the row counts."""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.triton_kernels.grouped import Source, matmul, outer
from megatron.kernels.triton_kernels.schedule import check_counts, check_same


class Triton:
    """The op's two products."""

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF."""
        check_same("grouped_gemm", x_RD, weight=weight_EDF)
        check_counts(rows_E, x_RD.shape[0])
        return matmul(Source(x_RD.contiguous()), weight_EDF.mT if transposed else weight_EDF, rows_E)

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF."""
        check_same("grouped_gemm", x_RD, y=y_RF)
        check_counts(rows_E, x_RD.shape[0])
        return outer(Source(x_RD.contiguous()), Source(y_RF.contiguous()), rows_E)
