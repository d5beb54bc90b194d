"""RMSNorm by csrc/rms_norm: one pass over memory each way."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.compiled import DTYPES, WIDENED, address, built
from megatron.kernels.rms_norm.reference import Reference


class Compiled:
    """float32, and bfloat16 widened inside. Other formats, and mixed ones, are the reference's."""

    def __init__(self) -> None:
        self.built = built()
        self.reference = Reference()

    def forward(self, x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(y, inverse)."""
        if not _serves(x, scale):
            return self.reference.forward(x, scale, epsilon)
        x, scale = x.contiguous(), scale.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        addresses = [address(t) for t in (x, scale, inverse, y)]
        self.built.rms_norm_forward(addresses, _sizes(x, scale), epsilon, DTYPES[x.dtype], torch.get_num_threads())
        return y, inverse

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the scale."""
        if not _serves(grad, x, scale):
            return self.reference.backward(grad, x, scale, inverse)
        grad, x, scale, inverse = (t.contiguous() for t in (grad, x, scale, inverse))
        grad_x, grad_scale = torch.empty_like(x), torch.empty_like(scale)
        addresses = [address(t) for t in (x, scale, inverse, grad, grad_x, grad_scale)]
        self.built.rms_norm_backward(addresses, _sizes(x, scale), DTYPES[x.dtype], torch.get_num_threads())
        return grad_x, grad_scale


def _serves(*tensors: Tensor) -> bool:
    return tensors[0].dtype in WIDENED and all(t.is_cpu and t.dtype == tensors[0].dtype for t in tensors)


def _sizes(x: Tensor, scale: Tensor) -> list[int]:
    """Rows, scales, dimensions."""
    dim = x.shape[-1]
    return [x.numel() // dim, scale.numel() // dim, dim]
