"""Matrix products in the dtype that a device has instructions for.

A CPU without 16-bit instructions emulates 16-bit products 10 to 140 times slower than float32 ones (PyTorch 2.13 on AVX2). There the factors are
cast to float32 for the product alone, and the result is rounded once. 16-bit instructions do the same: they too sum in float32.

Shapes: I in; O out; `...` any leading dimensions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}
"""The number formats by their names in the configuration (`precision`)."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies matrices of `dtype`: float32 where it could only emulate `dtype`, else `dtype` itself."""
    return torch.float32 if device.type == "cpu" and _emulated(dtype) else dtype


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x[..., I] @ weight^T + bias as [..., O], in the dtype of `x`; without bias where it is None."""
    if product_dtype(x.dtype, x.device) == x.dtype or x.dtype != weight_OI.dtype:
        return functional.linear(x, weight_OI, bias_O)
    y: Tensor = _WidenedLinear.apply(x, weight_OI, bias_O, x.dtype)
    return y


def float32_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x[..., I] @ weight^T as [..., O], computed and returned in float32 (float64 for float64). A 16-bit `x` is kept for the backward as it is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == dtype:
        return functional.linear(x, weight_OI.to(dtype))
    y: Tensor = _WidenedLinear.apply(x, weight_OI, None, dtype)
    return y


@cache
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks instructions for products of `dtype`."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


class _WidenedLinear(torch.autograd.Function):
    """The linear layer with 16-bit tensors kept for the backward, not their widened copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return functional.linear(x.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        wide = grad.float()
        grad_x = (wide @ weight_OI.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (wide.flatten(0, -2).t() @ x.flatten(0, -2).float()).to(weight_OI.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = wide.flatten(0, -2).sum(0).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None
