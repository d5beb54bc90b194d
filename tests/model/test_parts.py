"""Norms, dense MLPs and initial weights, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron.model.initialization import UnknownInitMethod, build_initializer, fill_each, standard_deviation
from megatron.model.mlp import build_mlp
from megatron.model.norms import RMSNorm, build_norm
from tests.model.tiny_model import model_section, moe_section, tiny_model


def test_rmsnorm() -> None:
    norm = build_norm(model_section(norm="rmsnorm", rms_norm_epsilon=1e-3))
    assert isinstance(norm, RMSNorm)
    nn.init.normal_(norm.scale)
    x = torch.randn(2, 3, 16)
    wanted = norm.scale * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(norm(x), wanted)
    assert norm.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_layernorm_has_the_configured_epsilon() -> None:
    norm = build_norm(model_section(layernorm_epsilon=1e-2))
    assert isinstance(norm, nn.LayerNorm)
    assert norm.eps == 1e-2


@pytest.mark.parametrize(
    ("activation", "act"), [("gelu", nn.functional.gelu), ("relu", torch.relu), ("silu", nn.functional.silu), ("swish", nn.functional.silu)]
)
def test_plain_mlp(activation: str, act: nn.Module) -> None:
    model = model_section(activation=activation)
    mlp, x = build_mlp(model, build_initializer(model, 0)), torch.randn(2, 3, 16)
    torch.testing.assert_close(mlp(x), mlp.linear2(act(mlp.linear1(x))))
    assert mlp.linear1.weight.shape == (24, 16)


@pytest.mark.parametrize(("activation", "act"), [("swiglu", nn.functional.silu), ("geglu", nn.functional.gelu), ("reglu", torch.relu)])
def test_gated_mlp_packs_up_then_gate(activation: str, act: nn.Module) -> None:
    model = model_section(activation=activation, intermediate_size=72)
    mlp, x = build_mlp(model, build_initializer(model, 0)), torch.randn(2, 3, 16)
    up, gate = mlp.linear1.weight[:24], mlp.linear1.weight[24:]
    torch.testing.assert_close(mlp(x), (act(x @ gate.T) * (x @ up.T)) @ mlp.linear2.weight.T)
    assert mlp.linear1.weight.shape == (48, 16)


@pytest.mark.parametrize("bias", [False, True])
def test_bias_is_of_the_dense_mlp(bias: bool) -> None:
    model = model_section(use_bias_in_mlp=bias)
    mlp = build_mlp(model, build_initializer(model, 0))
    assert (mlp.linear1.bias is not None) == (mlp.linear2.bias is not None) == bias
    assert not [name for name, _ in tiny_model(model, moe_section()).named_parameters() if "mlp" in name and "bias" in name]


WIDTH, LAYERS = 128, 8
STD = {
    "normal": 0.03,
    "scaled_normal": 0.03 / math.sqrt(2 * LAYERS),
    "single_residual_scaled_normal": 0.03 / math.sqrt(LAYERS),
    "small_init": math.sqrt(2 / (5 * WIDTH)),
    "wang_init": 2 / (LAYERS * math.sqrt(WIDTH)),
    "xavier_normal": math.sqrt(2 / (WIDTH + 512)),
    "xavier_uniform": math.sqrt(2 / (WIDTH + 512)),
}


@pytest.mark.parametrize(("method", "std"), STD.items(), ids=STD)
def test_initial_weights_have_the_right_spread(method: str, std: float) -> None:
    model = model_section(
        hidden_size=WIDTH, num_layers=LAYERS, intermediate_size=512, init_method=method, output_layer_init_method="normal", init_method_std=0.03
    )
    mlp = build_mlp(model, build_initializer(model, 0))
    weight = mlp.linear1.weight.detach()
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std * 3
    assert mlp.linear2.weight.std().item() == pytest.approx(0.03, rel=0.02)
    assert not mlp.linear1.bias.any()
    if method == "xavier_uniform":
        assert weight.abs().max().item() <= math.sqrt(6 / (WIDTH + 512))


def test_every_expert_is_drawn_as_a_matrix_of_its_own() -> None:
    model = model_section(init_method="xavier_normal")
    weight = torch.empty(4 * 24, 16)
    fill_each(build_initializer(model, 0).into, weight, 4)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (24 + 16)), rel=0.1)


def test_an_unknown_init_method_says_what_is_known() -> None:
    with pytest.raises(UnknownInitMethod, match="init method 'orthogonal': must be one of normal, scaled_normal"):
        standard_deviation("orthogonal", model_section())


def test_a_seed_gives_the_same_model_in_every_dtype() -> None:
    first, second, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    low = tiny_model(seed=1, dtype=torch.bfloat16)
    for (name, a), b, c, d in zip(first.named_parameters(), second.parameters(), other.parameters(), low.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.to(torch.bfloat16), d)
        assert a.std() == 0 or a.ndim == 1 or not torch.equal(a, c), name


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    tiny_model()
    assert torch.equal(state, torch.random.get_rng_state())
