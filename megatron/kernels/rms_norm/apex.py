"""RMSNorm by the fused kernels of NVIDIA's apex, where it is installed with them. CUDA.

apex multiplies by the scale before it rounds to 16 bits, the reference after it. These are the calls of apex's own autograd function
(`apex/normalization/fused_layer_norm.py`, 2024 and newer).
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from torch import Tensor

from megatron.kernels.rms_norm.reference import Reference


def unavailable() -> str | None:
    """Why apex's fused norms cannot run. None: they can."""
    if find_spec("apex") is None:
        return "the package apex is not installed (NVIDIA's, built with --cuda_ext)"
    return None if find_spec("fused_layer_norm_cuda") is not None else "apex was built without its fused norms (build it with --cuda_ext)"


class Apex:
    """The last dimension, with one scale for each of its numbers, in one format. The rest is the reference's."""

    def __init__(self) -> None:
        self.reference = Reference()
        self.fused = importlib.import_module("fused_layer_norm_cuda")

    def forward(self, x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(y, inverse)."""
        if not _serves(x, scale):
            return self.reference.forward(x, scale, epsilon)
        y, inverse_R = self.fused.rms_forward_affine(x.contiguous(), scale.shape, scale.contiguous(), epsilon)
        return y, inverse_R.view(x.shape[:-1])

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the scale."""
        if not _serves(x, scale):
            return self.reference.backward(grad, x, scale, inverse)
        no_epsilon, memory_efficient = 0.0, False  # the inverse has the epsilon in it; what is saved is x, not y
        given = grad.contiguous(), inverse.reshape(-1), x.contiguous(), scale.shape, scale.contiguous()
        grad_x, grad_scale = self.fused.rms_backward_affine(*given, no_epsilon, memory_efficient)
        return grad_x, grad_scale


def _serves(x: Tensor, scale: Tensor) -> bool:
    return x.numel() > 0 and scale.ndim == 1 and x.dtype == scale.dtype
