"""RMSNorm in plain PyTorch: any device, any dtype; the definition that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


class Reference:
    """Computes in float32 at least."""

    def forward(self, x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(y, inverse)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return scale * (wide * inverse).to(x.dtype), inverse.squeeze(-1)

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """dx = inverse * (g - n * mean(g * n)) with g = grad * scale and n = x * inverse; dscale = sum of grad * n."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed, grad = x.to(wide) * inverse[..., None], grad.to(wide)
        scaled = grad * scale.to(wide)
        grad_x = inverse[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (grad * normed).sum_to_size(scale.shape).to(scale.dtype)
