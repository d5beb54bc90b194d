"""What every router starts with: logits of all experts.

Shapes: T tokens; D model width; E experts; K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron.kernels.precision import float32_linear
from megatron.model.initialization import Fill


class RouterLinear(nn.Module):
    """Logits of every expert, computed in float32 (float64 for float64) whatever the model's dtype."""

    def __init__(self, width: int, num_experts: int, fill: Fill) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        fill(self.weight.data)

    def forward(self, x_TD: Tensor) -> Tensor:
        """logit_TE."""
        return logits(x_TD, self.weight)


def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """logit_TE = x W^T, in float32 (float64 for float64)."""
    return float32_linear(x_TD, weight_ED)


class Jitter(nn.Module):
    """Multiplies each number by a random factor from 1 - eps to 1 + eps in training (Switch Transformers, section 2.4)."""

    def __init__(self, eps: float | None) -> None:
        super().__init__()
        self.eps = eps or 0.0

    def forward(self, x_TD: Tensor) -> Tensor:
        """Same shape."""
        if not (self.training and self.eps):
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - self.eps, 1 + self.eps)


class ExactBuffers(nn.Module):
    """Its buffers stay in float32, whatever the model is cast to: small steps would be lost in bf16."""

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        exact = {name: buffer.float() for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class BalanceBias(ExactBuffers):
    """A bias on each expert's score that only steers the choice, and follows the load instead of a gradient (Wang et al., 2024; DeepSeek-V3).

    After a step, `update` raises the bias of experts that got fewer tokens than the mean by `rate` and lowers that of the others. It is a buffer,
    saved with the model.
    """

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    bias: Tensor

    def forward(self, score_TE: Tensor) -> Tensor:
        """score_TE + bias_E."""
        return score_TE + self.bias.to(score_TE.dtype)

    @torch.no_grad()
    def update(self, rows_E: Tensor) -> None:
        """b_e += rate * sign(mean rows - rows_e), with the rows of a whole step over all processes."""
        rows_E = rows_E.to(self.bias.device).double()
        self.bias += self.rate * torch.sign(rows_E.mean() - rows_E).to(torch.float32)
