"""The expert layer as four ops, each by its best implementation; the definition that the others are tested against."""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.experts.interface import Choices, ExpertWeights
from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import grouped_lore
from megatron.kernels.grouped_lore.interface import HiddenLayer, Projection
from megatron.kernels.permute import combine, permute, sort_by_group


class Reference:
    """Sort, hidden layer, second product, weighted sum."""

    def compute(self, x_TD: Tensor, choices: Choices, weights: ExpertWeights, activation: str) -> Tensor:
        """y_TD."""
        order = sort_by_group(choices.expert_TK, len(weights.up_EFD))
        return combine(self.compute_rows(permute(x_TD, order), order.rows_G, weights, activation), order, choices.weight_TK)

    def compute_rows(self, x_RD: Tensor, rows_E: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
        """y_RD: hidden layer and second product."""
        gate = None if weights.gate_EFD is None else Projection(weights.gate_EFD)
        hidden_RF = grouped_lore(x_RD, HiddenLayer(rows_E, activation, Projection(weights.up_EFD), gate))
        return grouped_gemm(hidden_RF, weights.down_EFD, rows_E)
