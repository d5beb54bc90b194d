"""Normalisation over the last dimension: `layernorm` (PyTorch's own) and `rmsnorm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + epsilon), the division in float32 whatever the dtype, as NeoX has it."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        wide = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        return self.scale * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x_BSD.dtype)


def build_norm(model: ModelConfig) -> nn.Module:
    """The norm that the model section names, over `hidden_size`."""
    if model.norm == "rmsnorm":
        return RMSNorm(model.hidden_size, model.rms_norm_epsilon)
    return nn.LayerNorm(model.hidden_size, eps=model.layernorm_epsilon)
