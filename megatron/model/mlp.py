"""The dense MLP: linear1, activation, linear2; gated activations take a linear1 of twice the width, packed [up ; gate].

Shapes: B batch; S sequence; D model width; F hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron.kernels.precision import linear
from megatron.model.activations import activation_function
from megatron.model.initialization import Fill, Initializer, zeros
from megatron.mpu.regions import WHOLE, Region

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class Linear(nn.Linear):
    """A linear layer whose builder fills it. PyTorch's own initialisation would draw from the global random state."""

    def reset_parameters(self) -> None:
        """Does nothing: the builder fills the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def build_linear(width_in: int, width_out: int, *, bias: bool, fill: Fill) -> nn.Linear:
    """A linear layer whose weight is filled by `fill` and whose bias starts at 0."""
    layer = Linear(width_in, width_out, bias=bias)
    fill(layer.weight.data)
    if bias:
        zeros(layer.bias.data)
    return layer


class MLP(nn.Module):
    """linear2(act(linear1(x)))."""

    def __init__(self, model: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.linear1 = build_linear(model.hidden_size, self.parts * model.mlp_width, bias=model.use_bias_in_mlp, fill=init.into)
        self.linear2 = build_linear(model.mlp_width, model.hidden_size, bias=model.use_bias_in_mlp, fill=init.out)
        self.activation = activation_function(model.hidden_function)
        self.region: Region = WHOLE

    parts = 1
    """Matrices packed in linear1."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        """y_BSD."""
        return self.region.row(self.linear2, self.activation(self.linear1(self.region.enter(x_BSD))))


class GatedMLP(MLP):
    """linear2(act(gate) * up), where linear1(x) = [up ; gate] (NeoX's order)."""

    parts = 2

    def forward(self, x_BSD: Tensor) -> Tensor:
        """y_BSD."""
        up_BSF, gate_BSF = self.linear1(self.region.enter(x_BSD)).chunk(2, dim=-1)
        return self.region.row(self.linear2, self.activation(gate_BSF) * up_BSF)


def build_mlp(model: ModelConfig, init: Initializer) -> MLP:
    """The dense MLP that the model section describes."""
    return GatedMLP(model, init) if model.is_gated else MLP(model, init)
