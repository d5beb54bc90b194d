"""Grouped matrix product by the CUDA kernels of csrc/grouped_gemm: bfloat16 and float16, sums in float32; other dtypes by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.cuda_library import HALVES, MOST_GROUPS, CudaLibrary, Rows, check_counts, load
from megatron.kernels.grouped_gemm.reference import Reference


class Cuda:
    """The two products. Nothing waits for the device: counts on a GPU are not checked but cut off at the rows that there are."""

    def __init__(self, library: CudaLibrary | None = None) -> None:
        """`library` None: the one for the GPU."""
        self.library = library or load()
        self.reference = Reference()

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF."""
        if x_RD.dtype not in HALVES or weight_EDF.dtype != x_RD.dtype:
            return self.reference.matmul(x_RD, weight_EDF, rows_E, transposed=transposed)
        check_counts(rows_E, x_RD.shape[0])
        outer = not transposed
        if not weight_EDF.is_contiguous() and weight_EDF.mT.is_contiguous():
            weight_EDF, outer, transposed = weight_EDF.mT, not outer, not transposed
        width = weight_EDF.shape[1 if transposed else 2]
        out_RF = self.library.empty(x_RD, x_RD.shape[0], width)
        groups = self.library.offsets(rows_E.to(x_RD.device, torch.int64).contiguous(), x_RD.shape[0])
        x_RD, weight_EDF = x_RD.contiguous(), weight_EDF.contiguous()
        self.library.rows(Rows(x_RI=x_RD, groups=groups, weight=weight_EDF, outer=outer, width=width, product=out_RF))
        return out_RF

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF."""
        if x_RD.dtype not in HALVES or y_RF.dtype != x_RD.dtype or rows_E.shape[0] > MOST_GROUPS:
            return self.reference.outer(x_RD, y_RF, rows_E)
        check_counts(rows_E, x_RD.shape[0])
        groups = self.library.offsets(rows_E.to(x_RD.device, torch.int64).contiguous(), x_RD.shape[0])
        return self.library.outer(x_RD.contiguous(), y_RF.contiguous(), groups)
