"""Weight-decomposed experts (CoSMoEs: Huber et al., 2025, equation 1): every matrix M of an expert is a product of two thin ones.

Shapes: R routed rows, sorted by expert; E experts; r rank; D model width; F expert width.

    M_nm = L_nr R_rm;  parameters r (n + m) instead of n m. The paper takes r as half the hidden size.
On disk a factor is two-dimensional with the experts stacked, [E*r, D] for what reads the hidden state and [E*F, r] for what reads or makes the
hidden layer. Biases, where `moe_expert_bias` asks for them, are added after the second factor. The second factor starts at a standard deviation of
1/sqrt(r), so that the product starts as a whole matrix would.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import grouped_lore
from megatron.kernels.grouped_lore.interface import HiddenLayer, Projection
from megatron.model.activations import kernel_activation
from megatron.model.initialization import Fill, Initializer, fill_each
from megatron.model.moe.experts.bias import ExpertBias, NoBias, build_bias
from megatron.model.moe.experts.grouped import GroupedExperts

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class DecomposedMLP(nn.Module):
    """act(x L1 R1) L2 R2 for every expert."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.num_experts, self.rank = moe.num_experts, moe.decomposition_rank(model.hidden_size)
        self.backend = moe.kernel_backends.get("grouped_gemm", "auto")
        self.hidden_backend = moe.kernel_backends.get("grouped_lore", "auto")
        self.activation = kernel_activation(model.hidden_function)
        thin = init.normal(1 / math.sqrt(self.rank))
        width, expert_width = model.hidden_size, moe.expert_width(model)
        self.w1_left, self.w1_right = self._factor(self.rank, width, init.into), self._factor(expert_width, self.rank, thin)
        self.w2_left, self.w2_right = self._factor(expert_width, self.rank, thin), self._factor(self.rank, width, init.out)
        self.b1 = build_bias(self.num_experts, expert_width, bias=moe.moe_expert_bias)
        self.b2 = build_bias(self.num_experts, width, bias=moe.moe_expert_bias)

    def hidden(self, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        """h_RF, activated: the grouped LoRE product with no whole matrix, and one pair of factors for each expert."""
        return grouped_lore(x_RD, HiddenLayer(rows_E, self.activation, self.up(), self.gate()), backend=self.hidden_backend)

    def up(self) -> Projection:
        """x L1 R1 + b1."""
        return self._projection(self.w1_left, self.w1_right, self.b1)

    def gate(self) -> Projection | None:
        """None: no gate."""
        return None

    def down(self, h_RF: Tensor, rows_E: Tensor) -> Tensor:
        """y_RD."""
        u_Rr = grouped_gemm(h_RF, self._per_expert(self.w2_left), rows_E, backend=self.backend)
        return self.b2(grouped_gemm(u_Rr, self._per_expert(self.w2_right), rows_E, backend=self.backend), rows_E)

    def _projection(self, left: Tensor, right: Tensor, bias: ExpertBias | NoBias) -> Projection:
        return Projection(None, self._per_expert(left), self._per_expert(right).mT, bias.values())

    def _per_expert(self, factor: Tensor) -> Tensor:
        return factor.view(self.num_experts, -1, factor.shape[1])

    def _factor(self, rows: int, columns: int, fill: Fill) -> nn.Parameter:
        factor = torch.empty(self.num_experts * rows, columns)
        fill_each(fill, factor, self.num_experts)
        return nn.Parameter(factor)


class GatedDecomposedMLP(DecomposedMLP):
    """(act(x L3 R3) * x L1 R1) L2 R2."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.w3_left = self._factor(self.rank, model.hidden_size, init.into)
        self.w3_right = self._factor(moe.expert_width(model), self.rank, init.normal(1 / math.sqrt(self.rank)))
        self.b3 = build_bias(self.num_experts, moe.expert_width(model), bias=moe.moe_expert_bias)

    def gate(self) -> Projection | None:
        """x L3 R3 + b3."""
        return self._projection(self.w3_left, self.w3_right, self.b3)


class DecomposedExperts(GroupedExperts):
    """E independent MLPs of decomposed matrices."""

    def build_mlp(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> DecomposedMLP:
        """The experts' weights."""
        return (GatedDecomposedMLP if model.is_gated else DecomposedMLP)(model, moe, init)
