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
        gate = None if weights.gate_EFD is None else Projection(weights.gate_EFD)
        hidden_RF = grouped_lore(permute(x_TD, order), HiddenLayer(order.rows_G, activation, Projection(weights.up_EFD), gate))
        return combine(grouped_gemm(hidden_RF, weights.down_EFD, order.rows_G), order, choices.weight_TK)
