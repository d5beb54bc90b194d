"""Grouped matrix product by PyTorch's `torch.nn.functional.grouped_mm`, on CPU and CUDA.

What PyTorch 2.13 does not take, and what is done about it:
    float64                                         the reference computes it
    rows that do not start at multiples of 16 bytes are copied to where they do; so is an expanded gradient, whose strides are 0
    16-bit numbers on a CPU without instructions    are multiplied in float32, as in the reference
    no rows, no width                               the result is zeros
    row counts that do not fit                      an error. On CUDA the device checks them, because reading them would make the host wait
On CPUs, and on GPUs before Hopper, PyTorch itself loops over the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels.grouped_gemm.reference import Reference, row_counts, widened

ALIGNMENT = 16
"""Bytes."""


def unavailable() -> str | None:
    """Why this PyTorch cannot do it. None: it can."""
    return None if hasattr(functional, "grouped_mm") else "this PyTorch has no torch.nn.functional.grouped_mm"


def product(x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor) -> Tensor:
    """y_RF, in the dtype of the factors, which `widened` has chosen; the weight in any layout."""
    rows, width = x_RD.shape[0], weight_EDF.shape[2]
    end_E = ends(rows_E, rows)
    if 0 in (rows, *weight_EDF.shape):
        return x_RD.new_zeros(rows, width)
    return functional.grouped_mm(aligned(x_RD), aligned(weight_EDF), offs=end_E).contiguous()


def outer_product(x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
    """out_EDF, likewise."""
    shape = len(rows_E), x_RD.shape[1], y_RF.shape[1]
    end_E = ends(rows_E, x_RD.shape[0])
    if 0 in (x_RD.shape[0], *shape):
        return x_RD.new_zeros(shape)
    return functional.grouped_mm(aligned(x_RD).t(), aligned(y_RF), offs=end_E).contiguous()


def ends(rows_E: Tensor, total: int) -> Tensor:
    """int32: where each expert's rows end. Raises ValueError for counts that do not fit; on CUDA the device stops with the same sentence."""
    end_E = rows_E.cumsum(0, dtype=torch.int32)
    if rows_E.device.type == "cpu":
        row_counts(rows_E, total)
        return end_E
    fits = (rows_E >= 0).all() & (rows_E.sum() == total)
    torch._assert_async(fits, f"row counts must be 0 or more and sum to {total} rows; every row belongs to exactly one group")
    return end_E.clamp(0, total)


def aligned(t: Tensor) -> Tensor:
    """The same values; itself where `grouped_mm` takes it, else a copy whose rows start at multiples of 16 bytes."""
    unit = ALIGNMENT // t.element_size()
    height, width = t.shape[-2:]
    down, across = t.stride()[-2:]
    by_rows = across == 1 and down >= width and down % unit == 0
    by_columns = down == 1 and across >= height and across % unit == 0
    if (by_rows or by_columns) and not any(stride % unit for stride in t.stride()[:-2]) and t.data_ptr() % ALIGNMENT == 0:
        return t
    padded = t.new_empty(*t.shape[:-1], -(-width // unit) * unit)
    return padded[..., :width].copy_(t)


class GroupedMM:
    """The op's two products."""

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF."""
        if x_RD.dtype == torch.float64:
            return Reference().matmul(x_RD, weight_EDF, rows_E, transposed=transposed)
        dtype = x_RD.dtype
        x_RD, weight_EDF = widened(x_RD, weight_EDF)
        return product(x_RD, weight_EDF.mT if transposed else weight_EDF, rows_E).to(dtype)

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF."""
        if x_RD.dtype == torch.float64:
            return Reference().outer(x_RD, y_RF, rows_E)
        dtype = x_RD.dtype
        x_RD, y_RF = widened(x_RD, y_RF)
        return outer_product(x_RD, y_RF, rows_E).to(dtype)
