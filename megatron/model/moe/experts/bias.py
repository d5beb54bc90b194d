"""Biases of experts: a row for each expert, added to the rows that are the expert's.

Shapes: R routed rows, sorted by expert; E experts; N the width of a projection's output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExpertBias(nn.Module):
    """y + bias of each row's expert (`moe_expert_bias`). Starts at 0."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, y_RN: Tensor, rows_E: Tensor) -> Tensor:
        """Same shape. `rows_E`: rows of each expert."""
        return y_RN + self.bias.to(y_RN.dtype).repeat_interleave(rows_E, dim=0, output_size=y_RN.shape[0])

    def values(self) -> Tensor | None:
        """bias_EN, for an op that adds it."""
        return self.bias


class NoBias(nn.Module):
    """No bias: y stays as it is."""

    def forward(self, y_RN: Tensor, rows_E: Tensor) -> Tensor:
        """The rows as they are."""
        return y_RN

    def values(self) -> Tensor | None:
        """None: there is no bias."""
        return None


def build_bias(num_experts: int, width: int, *, bias: bool) -> ExpertBias | NoBias:
    """The module that adds the biases of a projection, or one that adds nothing."""
    return ExpertBias(num_experts, width) if bias else NoBias()
