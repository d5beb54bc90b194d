"""Weight-decomposed experts, what stands beside the experts, and the settings of StructMoE, each against a loop over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config import config_from_dict
from megatron.config.components import EXPERTS, resolve_component
from megatron.config.experts import OPTIONS
from megatron.model.activations import activation_function
from megatron.model.initialization import build_initializer
from megatron.model.moe import MoELayer
from tests.model.tiny_model import model_section, moe_section

ROWS = [5, 0, 4]
E, D, F = 3, 16, 24


def inputs() -> Tensor:
    return torch.randn(sum(ROWS), D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(kind: str, activation: str = "gelu", **moe: Any) -> Any:
    model = model_section(activation=activation, ffn_hidden_size=F, intermediate_size=None)
    section = moe_section(moe_expert_type=kind, **moe)
    return resolve_component(EXPERTS, kind)(model, section, build_initializer(model, 3)).double()


def check(experts: Any, row: Callable[[int, Tensor], Tensor]) -> None:
    """The experts equal `row(expert, x_D)` for every row, gradients too."""
    x_RD = inputs().requires_grad_()
    y_RD, _ = experts(x_RD, torch.tensor(ROWS))
    owners = [e for e, rows in enumerate(ROWS) for _ in range(rows)]
    wanted = torch.stack([row(e, x_D) for e, x_D in zip(owners, x_RD, strict=True)])
    torch.testing.assert_close(y_RD, wanted, rtol=0, atol=1e-10)
    parameters = [x_RD, *experts.parameters()]
    for got, expected in zip(torch.autograd.grad(y_RD.sin().sum(), parameters), torch.autograd.grad(wanted.sin().sum(), parameters), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def parts(experts: Any) -> dict[str, Tensor]:
    return {name: weight.view(E, -1, weight.shape[1]) for name, weight in experts.mlp.named_parameters()}


def test_every_kind_has_its_options_class() -> None:
    assert set(OPTIONS) == set(EXPERTS)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_biases_are_those_of_each_row_s_expert(activation: str) -> None:
    experts = build("grouped", activation, moe_expert_bias=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in experts.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any()
            parameter.data.normal_(generator=generator)
    weights, act = {name: weight.view(E, -1, weight.shape[-1]) for name, weight in experts.mlp.named_parameters()}, activation_function(activation)

    def row(e: int, x_D: Tensor) -> Tensor:
        up_F = weights["w1"][e] @ x_D + weights["b1.bias"][e, 0]
        h_F = act(weights["w3"][e] @ x_D + weights["b3.bias"][e, 0]) * up_F if activation == "swiglu" else act(up_F)
        return h_F @ weights["w2"][e] + weights["b2.bias"][e, 0]

    check(experts, row)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu", "geglu"])
def test_decomposed_experts(activation: str) -> None:
    experts = build("decomposed", activation, moe_decomposition_rank=6)
    weights, act = parts(experts), activation_function(activation)

    def row(e: int, x_D: Tensor) -> Tensor:
        def project(name: str) -> Tensor:
            return weights[f"{name}_right"][e] @ (weights[f"{name}_left"][e] @ x_D)

        h_F = act(project("w3")) * project("w1") if "w3_left" in weights else act(project("w1"))
        return (h_F @ weights["w2_left"][e]) @ weights["w2_right"][e]

    check(experts, row)


def test_the_rank_is_half_the_width_unless_said_otherwise() -> None:
    assert build("decomposed").mlp.rank == D // 2
    assert build("decomposed", moe_decomposition_fraction=0.25).mlp.rank == D // 4
    assert build("decomposed", moe_decomposition_rank=5).mlp.rank == 5


def test_decomposed_matrices_start_as_large_as_whole_ones() -> None:
    model = model_section(hidden_size=256, ffn_hidden_size=512, intermediate_size=None, init_method_std=0.02, num_attention_heads=4)
    experts = resolve_component(EXPERTS, "decomposed")(model, moe_section(moe_expert_type="decomposed"), build_initializer(model, 3))
    product = experts.mlp.w1_right[:512] @ experts.mlp.w1_left[:128]
    assert product.std().item() == pytest.approx(0.02, rel=0.1)


def lore_row(experts: Any, e: int, x_D: Tensor, factors: Any, choices: int) -> Tensor:
    """Sum over the chosen LoREs of (pi x A) B."""
    lores = experts.lores
    a, b = factors.a.view(E, -1, factors.rank, D), factors.b.view(E, -1, factors.rank, factors.b.shape[1])
    if not hasattr(lores, "router"):
        return (a[e, 0] @ x_D) @ b[e, 0]
    pi_M = torch.softmax(lores.router.view(E, -1, D)[e] @ x_D, 0)
    best = pi_M.topk(choices).indices.tolist()
    return torch.stack([(pi_M[m] * (a[e, m] @ x_D)) @ b[e, m] for m in best]).sum(0)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize(
    ("interaction", "activation", "projection"),
    [
        ("entangled", "gelu", "up"),
        ("entangled", "swiglu", "up"),
        ("entangled", "swiglu", "gate"),
        ("entangled", "geglu", "both"),
        ("standalone", "gelu", "up"),
        ("standalone", "swiglu", "up"),
        ("gated", "relu", "up"),
    ],
)
def test_every_interaction_of_structmoe(interaction: str, activation: str, projection: str, choices: int, routed: bool) -> None:
    keys = {"moe_lore_interaction": interaction, "moe_lore_projection": projection, "moe_lore_top_k": choices, "moe_lore_routed": routed}
    experts = build("structmoe", activation, **keys)
    weights, act = parts(experts), activation_function(activation)

    def row(e: int, x_D: Tensor) -> Tensor:
        lore = lore_row(experts, e, x_D, experts.lores, choices)
        up, gate = weights["w1"][e] @ x_D, weights["w3"][e] @ x_D if "w3" in weights else None
        if interaction == "entangled" and projection in ("up", "both"):
            up = up + lore
        if interaction == "entangled" and projection in ("gate", "both"):
            gate = gate + lore_row(experts, e, x_D, experts.gate_lores if projection == "both" else experts.lores, choices)
        h_F = act(up) if gate is None else act(gate) * up
        if interaction == "gated":
            h_F = h_F * lore
        y_D = h_F @ weights["w2"][e]
        return y_D + lore if interaction == "standalone" else y_D

    check(experts, row)


def test_without_routers_there_is_one_lore_of_all_ranks() -> None:
    """Section 4.3: an expert and one LoRA-style product of rank M * Q."""
    experts = build("structmoe", moe_lore_routed=False, moe_num_lores=4, moe_lore_rank=3)
    assert experts.lores.rank == 12
    assert experts.num_lores == 0
    x_RD, weights = inputs(), parts(experts)
    a, b = experts.lores.a.view(E, 12, D), experts.lores.b.view(E, 12, F)
    merged = torch.stack([weights["w1"][e] + (a[e].T @ b[e]).T for e in range(E)])
    owners = [e for e, rows in enumerate(ROWS) for _ in range(rows)]
    wanted = torch.stack([nn.functional.gelu(merged[e] @ x_D) @ weights["w2"][e] for e, x_D in zip(owners, x_RD, strict=True)])
    torch.testing.assert_close(experts(x_RD, torch.tensor(ROWS))[0], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("interaction", ["entangled", "standalone"])
@pytest.mark.parametrize("routed", [True, False])
def test_lores_whose_b_is_zero_leave_the_plain_expert_bit_for_bit(routed: bool, interaction: str) -> None:
    experts = build("structmoe", moe_lore_init="zero", moe_lore_routed=routed, moe_lore_interaction=interaction)
    plain = build("grouped")
    plain.mlp.load_state_dict(experts.mlp.state_dict())
    assert torch.equal(experts(inputs(), torch.tensor(ROWS))[0], plain(inputs(), torch.tensor(ROWS))[0])


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_s_parameters_are_views_of_its_own_rows(kind: str) -> None:
    experts = build(kind)
    shares = [experts.expert_parameters(e) for e in range(E)]
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(torch.cat([share[name] for share in shares]), parameter, rtol=0, atol=0)
        assert shares[0][name].data_ptr() == parameter.data_ptr()


def layer_of(**moe: Any) -> MoELayer:
    model = model_section(ffn_hidden_size=F, intermediate_size=None)
    return MoELayer(model, moe_section(moe_expert_type="grouped", moe_losses={}, **moe), build_initializer(model, 3)).double()


def routed_part(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    routing = layer.router(x_BSD.flatten(0, 1))
    rows, plan = layer.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
    return layer.dispatcher.combine(layer.experts(rows, plan.rows_E)[0], plan).view(x_BSD.shape)


def test_shared_experts_are_added() -> None:
    layer, x_BSD = layer_of(moe_num_shared_experts=2), inputs()[None, :8]
    shared = layer.beside[0].mlp
    assert shared.linear1.weight.shape == (2 * F, D)
    torch.testing.assert_close(layer(x_BSD).y_BSD, routed_part(layer, x_BSD) + shared(x_BSD))


def test_the_shared_expert_s_gate() -> None:
    layer, x_BSD = layer_of(moe_shared_expert_intermediate_size=20, moe_shared_expert_gate=True), inputs()[None, :8]
    shared = layer.beside[0]
    gate = torch.sigmoid(x_BSD @ shared.gate.weight.T)
    torch.testing.assert_close(layer(x_BSD).y_BSD, routed_part(layer, x_BSD) + gate * shared.mlp(x_BSD))


def test_residual_moe_mixes_experts_and_mlp() -> None:
    layer, x_BSD = layer_of(moe_use_residual=True), inputs()[None, :8]
    residual = layer.beside[0]
    weights = torch.softmax(x_BSD @ residual.coefficient.weight.T + residual.coefficient.bias, -1)
    wanted = weights[..., :1] * routed_part(layer, x_BSD) + weights[..., 1:] * residual.mlp(x_BSD)
    torch.testing.assert_close(layer(x_BSD).y_BSD, wanted, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: layer(x).y_BSD, (x_BSD[:, :2].clone().requires_grad_(),))


def test_segments_are_narrower_experts_and_more_of_them() -> None:
    layer = layer_of(moe_expert_segments=4, moe_top_k=2)
    assert layer.experts.mlp.w1.shape == (3 * 4 * F // 4, D)
    assert layer.router(inputs()).expert_TK.shape == (9, 8)


def test_a_deepseekmoe_layer_from_yaml() -> None:
    """Fine-grained and shared experts beside a first dense layer."""
    model = {"num_layers": 3, "hidden_size": D, "num_attention_heads": 4, "seq_length": 8, "max_position_embeddings": 8}
    keys = {"moe_num_experts": 4, "moe_top_k": 2, "moe_expert_segments": 2, "moe_num_shared_experts": 2, "moe_first_k_dense_layers": 1}
    config = config_from_dict({**model, **keys, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 32, "moe_router_type": "topk"})
    assert config.model.mlp_width == 64
    assert {layer: section.expert_width(config.model) for layer, section in config.moe.for_layers(3).items()} == {1: 16, 2: 16}
    assert config.moe.shared_width(config.model) == 32
