"""Every parameter of every combination of parts gets a finite gradient that is not zero."""

from __future__ import annotations

import itertools
import typing
from typing import Any

import pytest
import torch

from megatron.config.components import EXPERTS, LOSSES, ROUTERS
from megatron.config.model import Activation, ModelConfig, Norm
from megatron.config.moe import MoEConfig
from megatron.model.initialization import build_initializer
from megatron.model.moe import MoELayer
from tests.model.tiny_model import DENSE, model_section, moe_section, tiny_model, tokens

FEED_FORWARD = ["dense", *itertools.product(ROUTERS, EXPERTS, [1, 2])]
LONG = {"max_position_embeddings": 32, "seq_length": 32}


def check_gradients(model: ModelConfig, moe: MoEConfig) -> None:
    gpt, text = tiny_model(model, moe), tokens(8, 33)
    gpt(text[:, :-1], labels_BS=text[:, 1:]).loss.backward()
    for name, parameter in gpt.named_parameters():
        if model.gpt_j_tied and "post_attention_layernorm" in name:
            assert parameter.grad is None, "the second norm of tied layers is on NeoX's disks only"
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("residual", "bias", "norm", "pos_emb"), [(False, True, "layernorm", "rotary"), (True, False, "rmsnorm", "learned")])
@pytest.mark.parametrize("feed_forward", FEED_FORWARD, ids=str)
def test_every_parameter_gets_a_gradient(feed_forward: Any, residual: bool, bias: bool, norm: str, pos_emb: str, activation: str) -> None:
    model = model_section(
        gpt_j_residual=residual,
        use_bias_in_mlp=bias,
        use_bias_in_attn_linear=bias,
        norm=norm,
        pos_emb=pos_emb,
        activation=activation,
        no_weight_tying=residual,
        num_kv_heads=2 if residual else None,
        **LONG,
    )
    moe = DENSE
    if feed_forward != "dense":
        router, experts, choices = feed_forward
        moe = moe_section(moe_router_type=router, moe_expert_type=experts, moe_top_k=choices, moe_lore_top_k=choices, moe_num_lores=2)
    check_gradients(model, moe)


RESIDUALS = [{}, {"gpt_j_residual": True}, {"gpt_j_residual": True, "gpt_j_tied": True}, {"reordered_norm": True}]
BIASES = [(attention, mlp, norms) for attention in (True, False) for mlp in (True, False) for norms in (True, False)]
QUERY_KEY_NORMS = [
    {},
    {"use_qk_layernorm": True},
    {"use_qk_layernorm": True, "num_kv_heads": 2},
    {"qk_norm_per_head": True, "num_kv_heads": 2},
    {"qk_norm_all_heads": True},
]


def grid() -> list[dict[str, Any]]:
    """Every norm with every position and every residual; biases, norms of queries and keys, windows and activations take turns."""
    pairs = list(itertools.product(typing.get_args(Norm), typing.get_args(ModelConfig.model_fields["pos_emb"].annotation)))
    activations = typing.get_args(Activation)
    cases = []
    for i, (norm, position) in enumerate(pairs * 3):
        attention, mlp, norms = BIASES[i % len(BIASES)]
        case = {"norm": norm, "pos_emb": position, "activation": activations[i % len(activations)], "sliding_window_width": (None, 5)[i % 2]}
        case |= {"use_bias_in_attn_linear": attention, "use_bias_in_mlp": mlp, "use_bias_in_norms": norms}
        cases.append(case | RESIDUALS[i // len(pairs)] | QUERY_KEY_NORMS[(i + i // len(pairs)) % 3])
    return cases


@pytest.mark.parametrize("case", grid(), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_parameter_of_every_variant_gets_a_gradient(case: dict[str, Any]) -> None:
    check_gradients(model_section(**case, **LONG), DENSE)


INTERACTIONS = [
    {},
    {"moe_lore_interaction": "standalone"},
    {"moe_lore_interaction": "gated", "activation": "silu"},
    {"moe_lore_routed": False},
    {"moe_lore_routed": False, "moe_lore_interaction": "standalone"},
    *({"moe_lore_projection": projection, "activation": "swiglu"} for projection in ("up", "gate", "both")),
    {"moe_lore_projection": "both", "activation": "geglu", "moe_lore_routed": False},
    {"moe_lore_interaction": "standalone", "activation": "swiglu"},
    {"moe_lore_normalize": True},
]
PLACES = [
    {"moe_num_shared_experts": 1},
    {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True},
    {"moe_use_residual": True},
    {"moe_use_residual": True, "moe_num_shared_experts": 2, "moe_shared_expert_gate": True},
    {"moe_expert_segments": 2},
    {"moe_num_experts": 1, "moe_num_experts_by_layer": [2, 4]},
    {"moe_expert_interval": 2},
    {"moe_first_k_dense_layers": 1},
    {"moe_layers": [1]},
]
ALL_LOSSES = dict.fromkeys(sorted(LOSSES.keys() - {"lore_balance"}), 0.01)


def moe_grid() -> list[dict[str, Any]]:
    """Every router with every kind of expert, residual and bias, by one; activations take turns, so that each comes with each router and kind."""
    activations = typing.get_args(Activation)
    return [
        {"router": router, "experts": experts, "residual": residual, "bias": bias, "activation": activations[i % len(activations)]}
        for i, (residual, bias, router, experts) in enumerate(itertools.product((False, True), (False, True), ROUTERS, EXPERTS))
    ]


@pytest.mark.parametrize("case", moe_grid(), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_router_with_every_kind_of_expert(case: dict[str, Any]) -> None:
    model = model_section(gpt_j_residual=case["residual"], use_bias_in_mlp=case["bias"], activation=case["activation"], **LONG)
    kinds = {"moe_router_type": case["router"], "moe_expert_type": case["experts"], "moe_expert_bias": case["bias"]}
    moe = moe_section(**kinds, moe_top_k=2, moe_num_lores=2, moe_losses=ALL_LOSSES)
    check_gradients(model, moe)


@pytest.mark.parametrize(("router", "experts"), list(itertools.product(ROUTERS, EXPERTS)))
def test_every_combination_in_a_layer(router: str, experts: str) -> None:
    """With each activation, with and without a residual MLP, biases in it, one expert and LoRE a token or two: 88 layers."""
    x_BSD = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    for activation, residual, bias, choices in itertools.product(typing.get_args(Activation), (False, True), (False, True), (1, 2)):
        model = model_section(use_bias_in_mlp=bias, activation=activation)
        beside = {"moe_use_residual": residual, "moe_top_k": choices, "moe_lore_top_k": choices, "moe_num_lores": 3, "moe_losses": {}}
        layer = MoELayer(model, moe_section(moe_router_type=router, moe_expert_type=experts, **beside), build_initializer(model, 2))
        layer(x_BSD).y_BSD.square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (activation, beside, name)
            assert torch.isfinite(parameter.grad).all(), (activation, beside, name)
            assert parameter.grad.any(), (activation, beside, name)


@pytest.mark.parametrize("router", ["topk", "sigmoid"])
@pytest.mark.parametrize("case", INTERACTIONS, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_what_lores_add_to(case: dict[str, Any], router: str) -> None:
    activation = case.get("activation", "gelu")
    section = {key: value for key, value in case.items() if key != "activation"}
    losses = {} if section.get("moe_lore_routed") is False else {"lore_balance": 0.01}
    lores = {"moe_num_lores": 2, "moe_lore_top_k": 2 if "moe_lore_normalize" in case else 1}
    if losses == {}:
        del lores["moe_lore_top_k"]
    check_gradients(model_section(activation=activation, **LONG), moe_section(moe_router_type=router, moe_losses=losses, **lores, **section))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", PLACES, ids=lambda case: "-".join(case))
def test_what_stands_beside_experts_and_where_they_are(case: dict[str, Any], experts: str) -> None:
    check_gradients(model_section(**LONG), moe_section(moe_expert_type=experts, moe_num_lores=2, moe_losses={}, **case))
