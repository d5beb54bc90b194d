"""Grouped matrix product: every expert multiplies its own rows. The one place this op is defined.

Shapes:  R routed rows, sorted by expert;  E experts;  D in;  F out.
    y_RF[r] = x_RD[r] @ weight_EDF[e(r)],  where e(r) is the expert that owns row r;
    with transposed=True the weight is stored as weight_EFD and used as its transpose.

An implementation supplies two products and no autograd; gradients are written here once:
    grad_x_RD = matmul(grad_y_RF, weight^T),  grad_weight = outer(x, grad_y), or outer(grad_y, x) for a transposed weight:
    either way the gradient is produced in the layout in which the weight is stored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.kernels import compiled, cuda_library, triton_kernels
from megatron.kernels.grouped_gemm import pytorch
from megatron.kernels.grouped_gemm.reference import Reference
from megatron.kernels.operator import torch_operator
from megatron.kernels.registry import Implementation, Op


class GroupedGemm(Protocol):
    """What an implementation supplies."""

    def matmul(self, x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool) -> Tensor:
        """y_RF; `rows_E` (int64) sums to R."""
        ...

    def outer(self, x_RD: Tensor, y_RF: Tensor, rows_E: Tensor) -> Tensor:
        """out_EDF[e] = x_e^T y_e, zero for an expert without rows."""
        ...


def _compiled() -> GroupedGemm:
    from megatron.kernels.grouped_gemm.compiled import Compiled

    return Compiled()


def _cuda() -> GroupedGemm:
    from megatron.kernels.grouped_gemm.cuda import Cuda

    return Cuda()


def _triton() -> GroupedGemm:
    from megatron.kernels.grouped_gemm.triton import Triton

    return Triton()


OP: Op[GroupedGemm] = Op("grouped_gemm")
OP.register(compiled.implementation(_compiled))
OP.register(cuda_library.implementation(_cuda))
OP.register(Implementation("triton", triton_kernels.DEVICES, triton_kernels.unavailable, _triton))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))
# By name only: on CPUs PyTorch loops over the experts as the reference does.
OP.register(Implementation("torch", frozenset({"cpu", "cuda"}), pytorch.unavailable, pytorch.GroupedMM))


def grouped_gemm(x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, *, transposed: bool = False, backend: str = "auto") -> Tensor:
    """Multiply each expert's rows by its weight; rows are sorted by expert, `rows_E` says how many each has.

    The result has the weight's dtype. A narrower `x` is widened to it for the product, and kept for the backward as it is.
    Raises ValueError on shapes or dtypes that do not fit, KernelUnavailable where `backend` cannot run.
    """
    if x_RD.ndim != 2 or weight_EDF.ndim != 3 or x_RD.shape[1] != weight_EDF.shape[2 if transposed else 1]:
        layout = "[experts, out, in]" if transposed else "[experts, in, out]"
        raise ValueError(
            f"grouped_gemm: x {tuple(x_RD.shape)} must be [rows, in] and the weight {tuple(weight_EDF.shape)} {layout} with the same 'in'"
        )
    if torch.promote_types(x_RD.dtype, weight_EDF.dtype) != weight_EDF.dtype:
        weight, rows = (f"{t.dtype} on {t.device}" for t in (weight_EDF, x_RD))
        raise ValueError(f"grouped_gemm: weight is {weight}, but x is {rows}; x may be narrower than the weight, not wider")
    if rows_E.shape != weight_EDF.shape[:1]:
        raise ValueError(f"grouped_gemm: row counts of shape {tuple(rows_E.shape)} for {weight_EDF.shape[0]} experts; give one count for each")
    return _grouped_gemm(x_RD, weight_EDF, rows_E, transposed, backend)


@torch_operator("neox::grouped_gemm")
def _grouped_gemm(x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, transposed: bool, backend: str) -> Tensor:
    return OP.resolve(backend, x_RD.device.type).matmul(x_RD.to(weight_EDF.dtype), weight_EDF, rows_E, transposed=transposed)


@torch_operator("neox::grouped_gemm_outer")
def _outer(x_RD: Tensor, y_RF: Tensor, rows_E: Tensor, backend: str) -> Tensor:
    return OP.resolve(backend, x_RD.device.type).outer(x_RD, y_RF, rows_E)


@torch.library.register_fake("neox::grouped_gemm")
def _(x_RD: Tensor, weight_EDF: Tensor, rows_E: Tensor, transposed: bool, backend: str) -> Tensor:
    return weight_EDF.new_empty(x_RD.shape[0], weight_EDF.shape[1 if transposed else 2])


@torch.library.register_fake("neox::grouped_gemm_outer")
def _(x_RD: Tensor, y_RF: Tensor, rows_E: Tensor, backend: str) -> Tensor:
    return x_RD.new_empty(rows_E.shape[0], x_RD.shape[1], y_RF.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RD, weight_EDF, rows_E, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(x_RD, weight_EDF, rows_E)


def _backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, weight_EDF, rows_E = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_gemm(grad_RF, weight_EDF, rows_E, not ctx.transposed, ctx.backend).to(x_RD.dtype)
    if ctx.needs_input_grad[1]:
        wide_RD = x_RD.to(weight_EDF.dtype)
        left, right = (grad_RF, wide_RD) if ctx.transposed else (wide_RD, grad_RF)
        grad_weight = _outer(left, right, rows_E, ctx.backend)
    return grad_x, grad_weight, None, None, None


_grouped_gemm.differentiate(_save, _backward)
