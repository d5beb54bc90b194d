"""Zero, copy and constant experts: a router may choose them, and they need no matrix product (MoE++: Jin et al., 2024, section 3.1).

Shapes: T tokens; D model width; K experts per token; E experts with weights; C experts that the router chooses from; J constant experts.

    zero(x) = 0;   copy(x) = x;   constant(x) = a_1 x + a_2 v,  (a_1, a_2) = softmax(x W_c),  v a trained vector, W_c [D, 2]
The router numbers the experts with weights first, then zero, copy and constant experts. A choice of one of the last three kinds becomes an empty
place for the dispatcher, so no row is made, sent or multiplied for it. Loads, losses, ExRep and the router's statistics count all C experts.

Our choices: no expert has a capacity limit (the paper gives each kind its own). The weights are those of the router, as in the paper (the authors'
code, SkyworkAI/MoE-plus-plus, divides them by their sum without the zero expert's). v starts like a matrix that writes to the residual stream (theirs
with a standard deviation of 1). x W_c, which has two columns, is computed for all tokens. Their loss is `heterogeneous_load_balance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.moe.routers.linear import RouterLinear
from megatron.model.moe.routing import Routing

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class ZeroComputation(nn.Module):
    """Zero and copy experts."""

    def __init__(self, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts, self.count = moe.num_experts, moe.num_zero_computation
        self.first_copy = moe.num_experts + moe.moe_zero_experts
        self.first_constant = self.first_copy + moe.moe_copy_experts

    def dispatched(self, routing: Routing) -> Routing:
        """The choices of experts with weights. Places with another choice are empty."""
        empty_TK = routing.expert_TK >= self.num_experts
        expert_TK, weight_TK = routing.expert_TK.clamp(max=self.num_experts), routing.weight_TK.masked_fill(empty_TK, 0.0)
        return routing._replace(expert_TK=expert_TK, weight_TK=weight_TK, padded=True, softmax=None)

    def loads(self, routing: Routing, rows_E: Tensor) -> Tensor:
        """Tokens of each of the C experts. `rows_E`: those of the experts with weights."""
        return routing.rows_E(self.num_experts + self.count)

    def add(self, y_TD: Tensor, x_TD: Tensor, routing: Routing, *, counts: bool) -> Tensor:
        """y plus what these experts give. `counts`: whether this process adds it, where y is a part of a sum over processes."""
        return y_TD + self.added(x_TD, routing) * counts

    def added(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What these experts give, times the router's weights."""
        return self.weights(routing)[:, self.first_copy :].sum(1, keepdim=True).to(x_TD.dtype) * x_TD

    def weights(self, routing: Routing) -> Tensor:
        """weight_TC: the router's weight of every expert for every token, 0 where it was not chosen."""
        choices = self.num_experts + self.count
        table_TC = routing.weight_TK.new_zeros(routing.weight_TK.shape[0], choices + 1)  # the last column: empty places
        return table_TC.scatter_add(1, routing.expert_TK, routing.weight_TK)[:, :choices]


class ConstantExperts(ZeroComputation):
    """Zero and copy experts, and constant ones."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(moe)
        self.mixture = RouterLinear(model.hidden_size, 2 * moe.moe_constant_experts, init.into)
        self.vector = nn.Parameter(torch.empty(moe.moe_constant_experts, model.hidden_size))
        init.out(self.vector.data)

    def added(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What these experts give, times the router's weights."""
        weight_TC = self.weights(routing)
        share_TJ2 = self.mixture(x_TD).unflatten(1, (-1, 2)).softmax(-1) * weight_TC[:, self.first_constant :, None]
        own_T, vector_TJ = weight_TC[:, self.first_copy : self.first_constant].sum(1) + share_TJ2[:, :, 0].sum(1), share_TJ2[:, :, 1]
        return own_T[:, None].to(x_TD.dtype) * x_TD + vector_TJ.to(x_TD.dtype) @ self.vector.to(x_TD.dtype)


class NoZeroComputation(nn.Module):
    """All experts have weights."""

    count = 0

    def dispatched(self, routing: Routing) -> Routing:
        """All choices."""
        return routing

    def loads(self, routing: Routing, rows_E: Tensor) -> Tensor:
        """The rows of the experts with weights."""
        return rows_E

    def add(self, y_TD: Tensor, x_TD: Tensor, routing: Routing, *, counts: bool) -> Tensor:
        """y."""
        return y_TD


def build_zero_computation(model: ModelConfig, moe: MoEConfig, init: Initializer) -> ZeroComputation | NoZeroComputation:
    """The experts without a matrix product that the config asks for."""
    if moe.moe_constant_experts:
        return ConstantExperts(model, moe, init)
    return ZeroComputation(moe) if moe.num_zero_computation else NoZeroComputation()
