"""Plain experts: E MLPs without biases, each for its own rows, as one grouped matrix product per projection.

Shapes: R routed rows, sorted by expert; E experts; D model width; F expert width. Weights lie on disk as NeoX has them, two-dimensional
[E*F, D]: y = act(x W1^T) W2; gated, with W3 the gate's projection, y = (act(x W3^T) * x W1^T) W2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.model.activations import activation_function
from megatron.model.initialization import Fill, Initializer, fill_each

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

UpProjection = Callable[[Tensor, Tensor], Tensor]
"""(x_RD, w1_EFD) -> h_RF."""


class ExpertMLP(nn.Module):
    """The weights of all experts of a layer and what is computed from them; the up-projection can be replaced by the caller."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.num_experts, self.width_in, self.width = moe.moe_num_experts, model.hidden_size, moe.expert_width(model)
        self.backend = moe.kernel_backends.get("grouped_gemm", "auto")
        self.activation = activation_function(model.hidden_function)
        self.w1 = self._matrix(init.into)
        self.w2 = self._matrix(init.out)

    def forward(self, x_RD: Tensor, rows_E: Tensor, up: UpProjection | None = None) -> Tensor:
        """y_RD; `up` computes the hidden layer before the activation from x and w1 (None: the product alone)."""
        w1_EFD = self.per_expert(self.w1)
        h_RF = self._multiply(x_RD, w1_EFD, rows_E) if up is None else up(x_RD, w1_EFD)
        return grouped_gemm(self._activate(h_RF, x_RD, rows_E), self.per_expert(self.w2), rows_E, backend=self.backend)

    def per_expert(self, weight: Tensor) -> Tensor:
        """A weight as [E, F, D]."""
        return weight.view(self.num_experts, self.width, self.width_in)

    def _activate(self, h_RF: Tensor, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        return self.activation(h_RF)

    def _multiply(self, x_RD: Tensor, weight_EFD: Tensor, rows_E: Tensor) -> Tensor:
        return grouped_gemm(x_RD, weight_EFD, rows_E, transposed=True, backend=self.backend)

    def _matrix(self, fill: Fill) -> nn.Parameter:
        weight = torch.empty(self.num_experts * self.width, self.width_in)
        fill_each(fill, weight, self.num_experts)
        return nn.Parameter(weight)


class GatedExpertMLP(ExpertMLP):
    """With a gate: w1 is the up-projection, w3 the gate's."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.w3 = self._matrix(init.into)

    def _activate(self, h_RF: Tensor, x_RD: Tensor, rows_E: Tensor) -> Tensor:
        return self.activation(self._multiply(x_RD, self.per_expert(self.w3), rows_E)) * h_RF


class GroupedExperts(nn.Module):
    """E independent MLPs."""

    num_lores = 0
    """LoREs of all experts together."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.mlp = (GatedExpertMLP if model.is_gated else ExpertMLP)(model, moe, init)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, None]:
        """(y_RD, None): there is no second routing."""
        return self.mlp(x_RD, rows_E), None

    def expert_parameters(self, expert: int) -> dict[str, Tensor]:
        """Parameter name -> the part of it that belongs to one expert, as a view."""
        return {name: parameter.chunk(self.mlp.num_experts)[expert] for name, parameter in self.named_parameters()}
