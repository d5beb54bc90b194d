"""Normalisation: one short class per kind, chosen by the model section.

Shapes: B batch; S sequence; D what is normalised, the model's width unless said otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.rms_norm import rms_norm

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + epsilon), the division in float32 whatever the dtype, as NeoX has it. The mean is over the last dimension."""

    def __init__(self, shape: tuple[int, ...], epsilon: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.epsilon = epsilon

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        return rms_norm(x_BSD, self.scale, self.epsilon)


class ScaleNorm(nn.Module):
    """g * x / max(|x|, epsilon) with a single weight g (Nguyen and Salazar, 2019, equation 5); |x| is the length along the last dimension."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.epsilon = epsilon

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        wide = _widened(x_BSD)
        return self.g * (wide / wide.norm(dim=-1, keepdim=True).clamp(min=self.epsilon)).to(x_BSD.dtype)


def build_norm(model: ModelConfig, *shape: int) -> nn.Module:
    """The norm that the model section names, over `hidden_size` or over the last dimensions of the sizes given.

    Of several dimensions layernorm takes mean and variance over all, rmsnorm and scalenorm over the last; the weights have their shape.
    """
    shape = shape or (model.hidden_size,)
    if model.norm == "rmsnorm":
        return RMSNorm(shape, model.rms_norm_epsilon)
    if model.norm == "scalenorm":
        return ScaleNorm(model.scalenorm_epsilon)
    affine = model.norm == "layernorm"
    return nn.LayerNorm(shape, eps=model.layernorm_epsilon, elementwise_affine=affine, bias=affine and model.use_bias_in_norms)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
