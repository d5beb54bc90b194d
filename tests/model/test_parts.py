"""Biases of MLPs and initial weights."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from megatron.config.model import InitMethod
from megatron.model.initialization import UnknownInitMethod, build_initializer, fill_each, standard_deviation
from megatron.model.mlp import build_mlp
from tests.model.tiny_model import model_section, moe_section, tiny_model


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
    "orthogonal": math.sqrt(2 / 512),
    "scaled_orthogonal": math.sqrt(2 / LAYERS / 512),
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


@pytest.mark.parametrize(("method", "gain"), [("orthogonal", 2.0), ("scaled_orthogonal", 2 / LAYERS)])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_orthogonal_rows_or_columns(method: str, gain: float, shape: tuple[int, int]) -> None:
    init = build_initializer(model_section(num_layers=LAYERS, init_method="normal", output_layer_init_method=method), 0)
    weight = torch.empty(shape)
    init.out(weight)
    narrow = weight if shape[0] < shape[1] else weight.T
    torch.testing.assert_close(narrow @ narrow.T, gain * torch.eye(16))


def test_every_method_of_the_config_is_drawn_from_the_seed() -> None:
    assert set(STD) == set(typing.get_args(InitMethod))
    for method in STD:
        first, same, other = (torch.empty(8, 8) for _ in range(3))
        for weight, seed in ((first, 1), (same, 1), (other, 2)):
            build_initializer(model_section(init_method=method), seed).into(weight)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_every_expert_is_drawn_as_a_matrix_of_its_own() -> None:
    model = model_section(init_method="xavier_normal")
    weight = torch.empty(4 * 24, 16)
    fill_each(build_initializer(model, 0).into, weight, 4)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (24 + 16)), rel=0.1)


def test_an_unknown_init_method_says_what_is_known() -> None:
    with pytest.raises(UnknownInitMethod, match="init method 'uniform': must be one of normal, orthogonal, scaled_normal, scaled_orthogonal, single"):
        standard_deviation("uniform", model_section())


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
