"""Sizes from the configuration alone, against sums written out by hand."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from megatron.config import config_from_dict
from megatron.config.components import ROUTERS
from megatron.config.model import QK_NORM_KEYS, Activation, ModelConfig, Norm
from megatron.config.neox import NeoXConfig
from megatron.config.size import count_parameters, flops_per_token, forward_flops, padded_vocab_size, training_memory

D, L, S, V = 64, 3, 32, 256


def config(**keys: Any) -> NeoXConfig:
    shape = {"num_layers": L, "hidden_size": D, "num_attention_heads": 4, "seq_length": S, "max_position_embeddings": S}
    return config_from_dict({**shape, "pos_emb": "rotary", **keys})


def sizes(**keys: Any) -> tuple[int, int]:
    built = config(**keys)
    count = count_parameters(built.model, built.moe, V)
    return count.total_sum, count.active_sum


def test_dense_gpt_neox() -> None:
    layer = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    expected = V * D + L * layer + 2 * D + V * D
    assert sizes(no_weight_tying=True) == (expected, expected)


def test_tied_with_learned_positions() -> None:
    layer = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    assert sizes(pos_emb="learned")[0] == V * D + S * D + L * layer + 2 * D


def test_dense_llama() -> None:
    kv = 2 * D // 4 * 2  # two of four heads, for keys and for values
    layer = 2 * D + D * (D + kv) + D * D + 3 * D * 128
    keys = {"norm": "rmsnorm", "activation": "swiglu", "intermediate_size": 384, "num_kv_heads": 2, "no_weight_tying": True}
    assert sizes(**keys, use_bias_in_attn_linear=False, use_bias_in_mlp=False)[0] == V * D + L * layer + D + V * D


def test_grouped_experts_in_every_second_layer() -> None:
    attention = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D)
    dense, expert = (4 * D * D + 4 * D) + (4 * D * D + D), 2 * D * 256
    common = V * D + L * attention + 2 * D + dense + 2 * 8 * D
    assert sizes(moe_num_experts=8, moe_top_k=2, moe_expert_interval=2) == (common + 2 * 8 * expert, common + 2 * 2 * expert)


def test_structmoe() -> None:
    width, lores, rank = 256, 8, 16
    attention = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D)
    expert, lore, router = 2 * D * width, rank * (D + width), lores * D
    common = V * D + L * attention + 2 * D + L * 4 * D
    keys = {"moe_num_experts": 4, "moe_expert_type": "structmoe", "moe_num_lores": lores, "moe_lore_rank": rank, "moe_lore_top_k": 2}
    assert sizes(**keys) == (common + L * 4 * (expert + lores * lore + router), common + L * (expert + 2 * lore + router))


def test_the_paper_s_match_of_13_experts_with_8_of_8_lores() -> None:
    """13 plain experts have as many parameters as 8 experts with 8 LoREs of rank 128 each, LoRE routers apart (d 1024, F 4096)."""
    shape = {"hidden_size": 1024, "num_attention_heads": 16, "num_layers": 1}
    plain = config(**shape, moe_num_experts=13)
    nested = config(**shape, moe_num_experts=8, moe_expert_type="structmoe", moe_num_lores=8, moe_lore_rank=128)
    count = count_parameters(nested.model, nested.moe, V).total
    assert count["experts"] + count["lores"] - 8 * 8 * 1024 == count_parameters(plain.model, plain.moe, V).total["experts"] == 109_051_904


def test_flops_follow_neox_for_a_dense_model() -> None:
    """NeoX: 24*3*B*s*L*h^2*(1 + s/6h + V/16Lh) for a batch, with MLPs of width 4h and without counting biases."""
    built = config(use_bias_in_attn_linear=False, use_bias_in_mlp=False)
    neox = 72 * L * D * D * (1 + S / (6 * D) + V / (16 * L * D))
    # NeoX counts V/16 where 2*V*D forward operations are V/12: it takes the output head three quarters seriously.
    head = 6 * V * D - 72 * L * D * D * V / (16 * L * D)
    assert flops_per_token(built.model, built.moe, V) == pytest.approx(neox + head)
    assert flops_per_token(built.model, built.moe, V, recompute=True) * 3 == flops_per_token(built.model, built.moe, V) * 4


@pytest.mark.parametrize(
    ("keys", "matrices"),
    [
        ({}, 3 * D * D + D * D + 8 * D * D),
        ({"num_kv_heads": 1}, D * D + 2 * D * D // 4 + D * D + 8 * D * D),
        ({"head_dim": D // 4, "num_kv_heads": 4}, 3 * D * D + D * D + 8 * D * D),
        ({"activation": "swiglu", "ffn_hidden_size": 100}, 4 * D * D + 3 * D * 100),
        ({"activation": "bilinear", "ffn_hidden_size": 100, "moe_num_experts": 8, "moe_top_k": 2}, 4 * D * D + 8 * D + 2 * 3 * D * 100),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_flops_are_those_of_the_matrices_that_a_token_meets(keys: dict[str, Any], matrices: int, bias: bool) -> None:
    built = config(**keys, use_bias_in_attn_linear=bias, use_bias_in_mlp=bias)
    assert flops_per_token(built.model, built.moe, V) == 3 * (2 * (L * matrices + V * D) + 4 * S * D * L)


def test_flops_of_heads_of_their_own_width() -> None:
    """Four heads of 48 dimensions, two key heads, in a model of width 64: products and scores are as wide as the heads."""
    built = config(head_dim=48, num_kv_heads=2)
    queries, keys = 4 * 48, 2 * 48
    matrices = D * (queries + 2 * keys) + queries * D + 8 * D * D
    assert flops_per_token(built.model, built.moe, V) == 3 * (2 * (L * matrices + V * D) + 4 * S * queries * L)


@pytest.mark.parametrize(("width", "keys"), [(7, 8), (S - 1, S), (4096, S)])
def test_flops_of_a_sliding_window_are_of_the_keys_in_it(width: int, keys: int) -> None:
    full, windowed = config(), config(sliding_window_width=width)
    assert flops_per_token(full.model, full.moe, V) - flops_per_token(windowed.model, windowed.moe, V) == 3 * 4 * (S - keys) * D * L


def test_flops_leave_out_biases_of_experts() -> None:
    plain, biased = (config(moe_num_experts=4, moe_top_k=2, moe_router_type="topk", moe_expert_bias=bias) for bias in (False, True))
    assert flops_per_token(plain.model, plain.moe, V) == flops_per_token(biased.model, biased.moe, V)


def test_flops_count_active_experts_only() -> None:
    few, many = config(moe_num_experts=2), config(moe_num_experts=16)
    router = 6 * L * 14 * D
    assert flops_per_token(many.model, many.moe, V) - flops_per_token(few.model, few.moe, V) == router


@pytest.mark.parametrize(
    ("precision", "stage", "processes", "bytes_"),
    [
        ("fp32", 0, 1, (4000, 4000, 8000)),
        ("fp32", 1, 4, (4000, 4000, 3000)),
        ("bfloat16", 0, 1, (2000, 4000, 12000)),
        ("fp16", 0, 4, (2000, 4000, 12000)),
        ("bfloat16", 1, 2, (2000, 2000, 6000)),
        ("fp16", 2, 4, (2000, 500, 3000)),
        ("fp16", 3, 4, (500, 500, 3000)),
    ],
)
def test_memory(precision: str, stage: int, processes: int, bytes_: tuple[int, int, int]) -> None:
    memory = training_memory(1000, precision, zero_stage=stage, data_parallel_size=processes)
    assert (memory.weights, memory.gradients, memory.optimizer) == bytes_
    assert memory.total == sum(bytes_)


@pytest.mark.parametrize(("averages", "fp32", "bf16", "fp16"), [((1, 4), 4000, 8000, 8000), ((0, 4), 0, 4000, 4000), ((2, 1), 2000, 6000, 6000)])
def test_memory_of_other_optimizers(averages: tuple[int, int], fp32: int, bf16: int, fp16: int) -> None:
    """Lion or SGD with momentum; plain SGD; averages of 8 bits."""
    for precision, expected in (("fp32", fp32), ("bfloat16", bf16), ("fp16", fp16)):
        memory = training_memory(1000, precision, zero_stage=0, data_parallel_size=1, averages=averages)
        assert memory.optimizer == expected, precision


def test_padded_vocab_size() -> None:
    assert [padded_vocab_size(size, 128) for size in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


MOE = {"moe_num_experts": 4, "moe_expert_interval": 2}
STRUCTMOE = {"moe_num_experts": 4, "moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 8}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "norm": [{"norm": name, "use_bias_in_norms": bias} for name in typing.get_args(Norm) for bias in (True, False)],
    "position": [{"pos_emb": name} for name in typing.get_args(ModelConfig.model_fields["pos_emb"].annotation)],
    "activation": [{"activation": name, **moe} for name in typing.get_args(Activation) for moe in ({}, MOE, STRUCTMOE)],
    "bias": [
        {"use_bias_in_mlp": mlp, **attention}
        for mlp in (True, False)
        for attention in ({}, {"use_bias_in_attn_linear": False}, {"use_bias_in_attn_linear": False, "add_qkv_bias": True})
    ],
    "residual": [{"gpt_j_residual": True}, {"gpt_j_residual": True, "gpt_j_tied": True}, {"reordered_norm": True}, {"no_weight_tying": True}],
    "heads": [{"num_kv_heads": heads} for heads in (1, 2, 4)],
    "heads of their own width": [
        {"head_dim": width, "num_kv_heads": 2, **keys}
        for width in (8, 16, 48)
        for keys in ({}, {"use_bias_in_attn_linear": False, "add_qkv_bias": True}, *({norm: True} for norm in QK_NORM_KEYS))
    ],
    "heads that do not divide the width": [{"hidden_size": 50, "num_attention_heads": 4, "head_dim": 8}],
    "query and key norms": [
        {"norm": norm, "use_bias_in_norms": bias, **keys}
        for norm in typing.get_args(Norm)
        for bias in (True, False)
        for keys in ({"use_qk_layernorm": True}, {"qk_norm_per_head": True, "num_kv_heads": 2}, {"qk_norm_all_heads": True, "num_kv_heads": 2})
    ],
    "router": [{"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": name} for name in ROUTERS],
    "recurrent routers": [
        {"moe_router_type": "recurrent", "moe_router_rnn_hidden_size": 24, **keys}
        for keys in ({"moe_num_experts": 4, "moe_layers": [1]}, {"moe_num_experts_by_layer": [2, 4]})
    ],
    "experts": [
        {"moe_num_experts": 4, "moe_expert_type": "decomposed", **keys}
        for keys in ({}, {"moe_decomposition_rank": 24, "activation": "swiglu"}, {"moe_decomposition_fraction": 0.3, "moe_ffn_hidden_size": 96})
    ],
    "biases of experts": [
        {**keys, "activation": activation, "moe_expert_bias": True, "moe_expert_segments": 2}
        for keys in (MOE, STRUCTMOE, {"moe_num_experts": 4, "moe_expert_type": "decomposed"})
        for activation in ("gelu", "swiglu")
    ],
    "LoREs": [
        {**STRUCTMOE, **keys}
        for keys in (
            {"moe_lore_routed": False},
            {"moe_lore_interaction": "standalone", "moe_lore_top_k": 2},
            {"moe_lore_interaction": "gated"},
            {"moe_lore_projection": "both", "activation": "swiglu"},
            {"moe_lore_projection": "gate", "activation": "geglu", "moe_lore_init": "zero"},
            {"moe_lore_projection": "both", "activation": "swiglu", "moe_lore_routed": False, "moe_expert_segments": 2},
        )
    ],
    "beside the experts": [
        {"moe_num_experts": 4, "use_bias_in_mlp": bias, **keys}
        for bias in (True, False)
        for keys in (
            {"moe_num_shared_experts": 2},
            {"moe_shared_expert_intermediate_size": 80, "moe_shared_expert_gate": True, "activation": "swiglu"},
            {"moe_use_residual": True},
            {"moe_use_residual": True, "moe_num_shared_experts": 1, "moe_expert_segments": 2, "moe_top_k": 2},
        )
    ],
    "layers": [
        {"moe_num_experts_by_layer": [2, 4]},
        {"moe_num_experts_by_layer": [4, 2], **{key: value for key, value in STRUCTMOE.items() if key != "moe_num_experts"}},
        {"moe_num_experts": 4, "moe_layers": [1]},
        {"moe_num_experts": 4, "moe_first_k_dense_layers": 1},
    ],
    "segments": [{"moe_num_experts": 4, "moe_expert_segments": 4}, {**STRUCTMOE, "moe_expert_segments": 2}],
    "width": [{"ffn_hidden_size": 100}, {"expansion_factor": 1.5, "mlp_multiple_of": 64}, {"activation": "swiglu", "intermediate_size": 100}],
}


@pytest.mark.parametrize("keys", [keys for variants in VARIANTS.values() for keys in variants], ids=str)
def test_the_model_that_is_built_has_this_many(keys: dict[str, Any]) -> None:
    from megatron.model import build_model

    built = config(**{"num_layers": 2, **keys})
    model = build_model(built.model, built.moe, V, seed=1)
    count = count_parameters(built.model, built.moe, V)
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total_sum
    assert count.active_sum <= count.total_sum


def test_an_unused_second_norm_is_stored_but_not_met() -> None:
    tied = config(gpt_j_residual=True, gpt_j_tied=True)
    count = count_parameters(tied.model, tied.moe, V)
    assert count.total_sum - count.active_sum == L * 2 * D


def test_recomputed_modules_are_counted_once_more() -> None:
    built = config(num_layers=4, moe_num_experts=4, moe_top_k=2, moe_router_type="topk", moe_expert_interval=2, moe_num_shared_experts=1)

    def more(*modules: str) -> int:
        return flops_per_token(built.model, built.moe, V, modules=modules) - flops_per_token(built.model, built.moe, V)

    forward = forward_flops(built.model, built.moe, V)
    assert more("attention") == 4 * (2 * 4 * D**2 + 4 * S * D)
    assert more("mlp") == 2 * (2 * 2 * 4 * D**2)
    assert more("experts") == 2 * (2 * 2 * 2 * 4 * D**2)
    assert more("moe") == more("experts") + forward["beside"] + forward["routers"] > more("experts")
    assert more("attention", "mlp", "moe") == sum(forward.values()) - forward["head"]
