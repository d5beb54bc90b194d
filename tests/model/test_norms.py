"""Every norm against its formula."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megatron.config.model import Norm
from megatron.model.norms import build_norm
from tests.model.tiny_model import model_section, tiny_model

EPSILON = 1e-3
FORMULAS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "layernorm": lambda norm, x: norm.weight * centred(x) / torch.sqrt(centred(x).square().mean(-1, keepdim=True) + EPSILON) + norm.bias,
    "rmsnorm": lambda norm, x: norm.scale * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPSILON),
    "scalenorm": lambda norm, x: norm.g * x / x.square().sum(-1, keepdim=True).sqrt(),
    "non_parametric_layernorm": lambda _, x: centred(x) / torch.sqrt(centred(x).square().mean(-1, keepdim=True) + EPSILON),
}
PARAMETERS = {"layernorm": {"weight", "bias"}, "rmsnorm": {"scale"}, "scalenorm": {"g"}, "non_parametric_layernorm": set()}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def build(kind: str, *shape: int, **changes: object) -> nn.Module:
    norm = build_norm(model_section(norm=kind, layernorm_epsilon=EPSILON, rms_norm_epsilon=EPSILON, scalenorm_epsilon=EPSILON, **changes), *shape)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def test_the_formulas_are_of_every_norm_of_the_config() -> None:
    assert set(FORMULAS) == set(typing.get_args(Norm))


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_norm_is_its_formula(kind: str) -> None:
    norm, x = build(kind).double(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), FORMULAS[kind](norm, x))
    assert torch.autograd.gradcheck(norm, (x,))
    assert {name for name, _ in norm.named_parameters()} == PARAMETERS[kind], "GPT-NeoX's names"


@pytest.mark.parametrize("kind", FORMULAS)
def test_sixteen_bits_keep_their_dtype_and_lose_little(kind: str) -> None:
    norm, x = build(kind), torch.randn(2, 3, 16)
    wide = norm(x)
    low = norm.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wide, rtol=0.05, atol=0.05)


def test_scalenorm_divides_by_no_less_than_its_epsilon() -> None:
    norm = build("scalenorm")
    torch.testing.assert_close(norm(torch.full((1, 16), 1e-9)), norm.g * torch.full((1, 16), 1e-9 / EPSILON))
    assert torch.equal(norm(torch.zeros(1, 16)), torch.zeros(1, 16))


def test_layernorm_does_without_a_bias_where_it_is_told_to() -> None:
    norm = build("layernorm", use_bias_in_norms=False)
    assert norm.bias is None
    x = torch.randn(2, 16)
    wanted = norm.weight * centred(x) / torch.sqrt(centred(x).square().mean(-1, keepdim=True) + EPSILON)
    torch.testing.assert_close(norm(x), wanted)
    assert not [name for name, _ in tiny_model(model_section(use_bias_in_norms=False)).named_parameters() if "norm" in name and "bias" in name]


def test_over_two_dimensions_layernorm_takes_both_and_rmsnorm_the_last() -> None:
    x = torch.randn(2, 3, 4)
    layer, rms = build("layernorm", 3, 4), build("rmsnorm", 3, 4)
    flat = centred(x.flatten(1))
    wanted = (flat / torch.sqrt(flat.square().mean(-1, keepdim=True) + EPSILON)).view(2, 3, 4)
    torch.testing.assert_close(layer(x), layer.weight * wanted + layer.bias)
    torch.testing.assert_close(rms(x), FORMULAS["rmsnorm"](rms, x))
    assert layer.weight.shape == rms.scale.shape == (3, 4)
