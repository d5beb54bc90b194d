"""Modules beside the routed experts, which every token goes through.

Shapes: ... any leading dimensions; D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.mlp import build_linear, build_mlp
from megatron.model.moe.routers.linear import RouterLinear

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class SharedExpert(nn.Module):
    """y + mlp(x) (DeepSeekMoE: Dai et al., 2024, equation 9; the K_s shared experts are one MLP of K_s times the width)."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        width = {"ffn_hidden_size": moe.shared_width(model), "intermediate_size": None, "expansion_factor": None}
        self.mlp = build_mlp(model.model_copy(update=width), init)

    def branch(self, x: Tensor) -> Tensor:
        """What does not depend on the routed experts."""
        return self.mlp(x)

    def forward(self, x: Tensor, y: Tensor, branch: Tensor) -> Tensor:
        """The layer's output."""
        return y + branch


class GatedSharedExpert(SharedExpert):
    """y + sigmoid(x w) * mlp(x) (Qwen1.5-MoE)."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.gate = RouterLinear(model.hidden_size, 1, init.into)

    def branch(self, x: Tensor) -> Tensor:
        """What does not depend on the routed experts."""
        return self.gate(x).sigmoid().to(x.dtype) * self.mlp(x)


class ResidualMLP(nn.Module):
    """c1 * y + c2 * mlp(x) with (c1, c2) = softmax(x W + b) (DeepSpeed-MoE's residual MoE: Rajbhandari et al., 2022, section 4.1.2)."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.mlp = build_mlp(model, init)
        self.coefficient = build_linear(model.hidden_size, 2, bias=True, fill=init.into)

    def branch(self, x: Tensor) -> Tensor:
        """What does not depend on the routed experts."""
        return self.mlp(x)

    def forward(self, x: Tensor, y: Tensor, branch: Tensor) -> Tensor:
        """The layer's output."""
        logits = self.coefficient(x)
        weights = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        experts, dense = weights.to(x.dtype).unsqueeze(-2).unbind(-1)
        return experts * y + dense * branch


def build_beside(model: ModelConfig, moe: MoEConfig, init: Initializer) -> nn.ModuleList:
    """The modules that the config puts beside the routed experts. Each maps (x, y so far, its `branch` of x) to y."""
    beside: list[nn.Module] = []
    if moe.shared_width(model):
        beside.append((GatedSharedExpert if moe.moe_shared_expert_gate else SharedExpert)(model, moe, init))
    if moe.moe_use_residual:
        beside.append(ResidualMLP(model, moe, init))
    return nn.ModuleList(beside)
