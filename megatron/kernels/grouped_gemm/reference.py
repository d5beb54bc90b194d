"""Grouped matrix product as a loop over experts: any device, any dtype; the definition that the others are tested against.

Every product is written straight into its place in one preallocated result, so there is neither a concatenation nor a buffer of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.precision import product_dtype


def row_counts(rows_E: Tensor, total: int) -> list[int]:
    """The counts on the host; raises ValueError unless they are 0 or more and sum to `total` rows."""
    rows = rows_E.tolist()
    if min(rows, default=0) < 0:
        raise ValueError(f"row counts must be 0 or more, and one is {min(rows)}")
    if sum(rows) != total:
        raise ValueError(f"row counts sum to {sum(rows)}, but there are {total} rows; every row belongs to exactly one group")
    return rows


def matmul_into(out_RF: Tensor, x_RD: Tensor, weights: tuple[Tensor, ...], rows: list[int]) -> None:
    """out[rows of e] = x[rows of e] @ weights[e]."""
    for out, x, weight in zip(out_RF.split(rows), x_RD.split(rows), weights, strict=True):
        if len(x):
            torch.mm(x, weight, out=out)


def outer_into(out_EDF: Tensor, x_RD: Tensor, y_RF: Tensor, rows: list[int]) -> None:
    """out[e] = x[rows of e]^T @ y[rows of e]."""
    for out, x, y in zip(out_EDF.unbind(), x_RD.split(rows), y_RF.split(rows), strict=True):
        if len(x):
            torch.mm(x.t(), y, out=out)
        else:
            out.zero_()


def slices(weight_EDF: Tensor, *, transposed: bool) -> tuple[Tensor, ...]:
    """One matrix per expert, as a view, turned when the weight is stored transposed."""
    return (weight_EDF.mT if transposed else weight_EDF).unbind()


def widened(*given: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that their device multiplies in; themselves where that is their own."""
    return tuple(t.to(product_dtype(t.dtype, t.device)) for t in given)


class Reference:
    """The loop, as the op's two products."""

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF."""
        x_RD, weight_EDF, dtype = *widened(x_RD, weight_EDF), x_RD.dtype
        out_RF = x_RD.new_empty(x_RD.shape[0], weight_EDF.shape[1 if transposed else 2])
        matmul_into(out_RF, x_RD, slices(weight_EDF, transposed=transposed), row_counts(rows_E, x_RD.shape[0]))
        return out_RF.to(dtype)

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF."""
        x_RD, y_RF, dtype = *widened(x_RD, y_RF), x_RD.dtype
        out_EDF = x_RD.new_empty(rows_E.shape[0], x_RD.shape[1], y_RF.shape[1])
        outer_into(out_EDF, x_RD, y_RF, row_counts(rows_E, x_RD.shape[0]))
        return out_EDF.to(dtype)
