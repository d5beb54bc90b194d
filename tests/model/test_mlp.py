"""Every activation of the config in the dense MLP and in experts, against its formula; widths."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.config.model import GATED_ACTIVATIONS, Activation
from megatron.model.activations import GATED, PLAIN, activation_function
from megatron.model.initialization import build_initializer
from megatron.model.mlp import build_mlp
from megatron.model.moe.experts.grouped import GroupedExperts
from tests.model.tiny_model import model_section, moe_section


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * normal_cdf(x),
    "geglu": lambda x: x * normal_cdf(x),
    "relu": lambda x: x.clamp(min=0),
    "reglu": lambda x: x.clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "bilinear": lambda x: x,
}


def gelu_tanh(x: Tensor) -> Tensor:
    """The kernel that GPT-NeoX fuses with the bias."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def test_the_tables_are_those_of_the_config() -> None:
    assert set(FORMULAS) == set(typing.get_args(Activation)) == set(PLAIN | GATED) - {"gelu_tanh"}
    assert set(GATED) == GATED_ACTIVATIONS


@pytest.mark.parametrize("activation", FORMULAS)
def test_an_activation_is_its_formula(activation: str) -> None:
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, wanted = activation_function(activation)(x), FORMULAS[activation](x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(wanted.sum(), x)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_the_dense_mlp(activation: str, bias: bool) -> None:
    model = model_section(activation=activation, ffn_hidden_size=24, intermediate_size=None, use_bias_in_mlp=bias)
    mlp, x = build_mlp(model, build_initializer(model, 0)).double(), torch.randn(2, 3, 16, dtype=torch.float64)
    if bias:
        torch.nn.init.normal_(mlp.linear1.bias)
        torch.nn.init.normal_(mlp.linear2.bias)
    hidden, act = x @ mlp.linear1.weight.T + (mlp.linear1.bias if bias else 0), FORMULAS[activation]
    hidden = act(hidden[..., 24:]) * hidden[..., :24] if activation in GATED else act(hidden)
    torch.testing.assert_close(mlp(x), hidden @ mlp.linear2.weight.T + (mlp.linear2.bias if bias else 0))
    assert mlp.linear1.weight.shape == (48 if activation in GATED else 24, 16)


@pytest.mark.parametrize("activation", FORMULAS)
def test_experts_take_every_activation(activation: str) -> None:
    model = model_section(activation=activation, ffn_hidden_size=24, intermediate_size=None)
    experts = GroupedExperts(model, moe_section(moe_expert_type="grouped"), build_initializer(model, 0)).double()
    x_RD, rows_E, act = torch.randn(7, 16, dtype=torch.float64), [3, 0, 4], FORMULAS[activation]
    weights = {name: weight.view(3, 24, 16) for name, weight in experts.mlp.named_parameters()}
    wanted = []
    for e, rows in enumerate(x_RD.split(rows_E)):
        hidden = rows @ weights["w1"][e].T
        hidden = act(rows @ weights["w3"][e].T) * hidden if activation in GATED else act(hidden)
        wanted.append(hidden @ weights["w2"][e])
    torch.testing.assert_close(experts(x_RD, torch.tensor(rows_E))[0], torch.cat(wanted))
    assert ("w3" in weights) == (activation in GATED)


@pytest.mark.parametrize("bias", [False, True])
def test_bias_gelu_fusion_is_the_tanh_approximation(bias: bool) -> None:
    model = model_section(bias_gelu_fusion=True, use_bias_in_mlp=bias)
    mlp, x = build_mlp(model, build_initializer(model, 0)), 3 * torch.randn(2, 3, 16)
    hidden = mlp.linear1(x)
    torch.testing.assert_close(mlp(x), mlp.linear2(gelu_tanh(hidden)), rtol=1e-5, atol=1e-6)
    assert (mlp(x) - mlp.linear2(FORMULAS["gelu"](hidden))).abs().max() > 1e-5, "which is not the exact GELU"
    experts = GroupedExperts(model, moe_section(moe_expert_type="grouped"), build_initializer(model, 0))
    assert experts.mlp.activation == "gelu_tanh"


@pytest.mark.parametrize("activation", sorted(set(FORMULAS) - {"gelu"}))
def test_bias_gelu_fusion_leaves_other_activations_alone(activation: str) -> None:
    assert model_section(activation=activation, bias_gelu_fusion=True).hidden_function == activation
