"""Plain experts: E MLPs, each for its own rows, as one grouped matrix product per projection. Biases where `moe_expert_bias` asks for them.

Shapes: R routed rows, sorted by expert; E experts; D model width; F expert width. Weights lie on disk as NeoX has them, two-dimensional
[E*F, D]: y = act(x W1^T) W2; gated, with W3 the gate's projection, y = (act(x W3^T) * x W1^T) W2. Biases are [E, F] and [E, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.kernels.experts.interface import ExpertWeights
from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import grouped_lore
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.model.activations import kernel_activation
from megatron.model.initialization import Fill, Initializer, fill_each
from megatron.model.moe.experts.bias import build_bias
from megatron.model.moe.routing import LoreRouting

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


Factors = tuple[Tensor | None, Tensor | None]
"""(a_GQD, b_GQF) of LoREs; None where there are none."""
NO_FACTORS: Factors = (None, None)
NO_LORES: Mapping[str, Factors] = {}


class ExpertMLP(nn.Module):
    """The weights of all experts of a layer, and what each of them multiplies."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.num_experts, self.width_in, self.width = moe.num_experts, model.hidden_size, moe.expert_width(model)
        self.backend = moe.kernel_backends.get("grouped_gemm", "auto")
        self.hidden_backend = moe.kernel_backends.get("grouped_lore", "auto")
        self.activation = kernel_activation(model.hidden_function)
        self.w1 = self._matrix(init.into)
        self.w2 = self._matrix(init.out)
        self.b1 = build_bias(self.num_experts, self.width, bias=moe.moe_expert_bias)
        self.b2 = build_bias(self.num_experts, self.width_in, bias=moe.moe_expert_bias)

    def hidden(self, x_RD: Tensor, rows_E: Tensor, lores: Mapping[str, Factors] = NO_LORES, choice: LoreChoice | None = None) -> Tensor:
        """h_RF, activated; with the chosen ones of `lores`, which are the factors for `up` and for `gate`."""
        layer = HiddenLayer(rows_E, self.activation, self.up(lores.get("up", NO_FACTORS)), self.gate(lores.get("gate", NO_FACTORS)), choice)
        return grouped_lore(x_RD, layer, backend=self.hidden_backend)

    def up(self, factors: Factors = NO_FACTORS) -> Projection:
        """x W1^T + b1, with LoREs where there are factors."""
        return Projection(self.per_expert(self.w1), *factors, self.b1.values())

    def gate(self, factors: Factors = NO_FACTORS) -> Projection | None:
        """None: no gate."""
        return None

    def down(self, h_RF: Tensor, rows_E: Tensor) -> Tensor:
        """y_RD = h W2 + b2."""
        return self.b2(grouped_gemm(h_RF, self.per_expert(self.w2), rows_E, backend=self.backend), rows_E)

    def matrices(self) -> ExpertWeights:
        """All of them, for a library that computes the whole layer."""
        return ExpertWeights(self.per_expert(self.w1), None, self.per_expert(self.w2))

    def per_expert(self, weight: Tensor) -> Tensor:
        """A weight as [E, F, D]."""
        return weight.view(self.num_experts, self.width, self.width_in)

    def _matrix(self, fill: Fill) -> nn.Parameter:
        weight = torch.empty(self.num_experts * self.width, self.width_in)
        fill_each(fill, weight, self.num_experts)
        return nn.Parameter(weight)


class GatedExpertMLP(ExpertMLP):
    """With a gate: w1 is the up-projection, w3 the gate's."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.w3 = self._matrix(init.into)
        self.b3 = build_bias(self.num_experts, self.width, bias=moe.moe_expert_bias)

    def gate(self, factors: Factors = NO_FACTORS) -> Projection | None:
        """x W3^T + b3, with LoREs where there are factors."""
        return Projection(self.per_expert(self.w3), *factors, self.b3.values())

    def matrices(self) -> ExpertWeights:
        """All of them."""
        return super().matrices()._replace(gate_EFD=self.per_expert(self.w3))


class GroupedExperts(nn.Module):
    """E independent MLPs."""

    num_lores = 0
    """LoREs of all experts together."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.num_experts = moe.num_experts
        self.mlp = self.build_mlp(model, moe, init)

    def build_mlp(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> Any:
        """The experts' weights: a module with `hidden` and `down`."""
        return (GatedExpertMLP if model.is_gated else ExpertMLP)(model, moe, init)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting | None]:
        """(y_RD, the second routing; None where there is none)."""
        return self.mlp.down(self.mlp.hidden(x_RD, rows_E), rows_E), None

    def expert_parameters(self, expert: int) -> dict[str, Tensor]:
        """Parameter name -> the part of it that belongs to one expert, as a view."""
        return {name: parameter.chunk(self.num_experts)[expert] for name, parameter in self.named_parameters()}
