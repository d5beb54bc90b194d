"""Keys of the MoE family that were given and have no effect, because they belong to a component that was not chosen: a notice with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import load_config, load_values
from megatron.config.section import ConfigError
from megatron.testing.tiny import tiny_config

BASE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\nmax_position_embeddings: 32\nmoe_num_experts: 4\n"
OF_ONE_EXPERT = "makes the weight of every chosen expert 1 when moe_top_k is 1; the router then learns from moe_losses only"
OF_ONE_LORE = "makes the weight of every chosen LoRE 1 when moe_lore_top_k is 1; the LoRE routers then learn from lore_balance only"
NEW = "quantile_balancing and expert_threshold and document_pool and recurrent"
SCALED = "it is for topk and sigmoid and quantile_balancing and document_pool and recurrent"
NORMALIZED = "it is for topk and sigmoid and top_p and quantile_balancing and document_pool and recurrent"
UNROUTED = "moe_expert_type: structmoe\nmoe_lore_rank: 8\nmoe_lore_routed: false\n"


@pytest.mark.parametrize(
    ("given", "notices"),
    [
        ("moe_router_top_p: 0.3", ["1: 'moe_router_top_p' has no effect with moe_router_type sinkhorn; it is for top_p"]),
        (
            "moe_jitter_eps: 0.1",
            [
                "1: 'moe_jitter_eps' has no effect with moe_router_type sinkhorn; "
                f"it is for topk and sigmoid and top_p and expert_choice and {NEW} and smoe_dropout"
            ],
        ),
        (
            "moe_router_type: sigmoid\nmoe_router_pre_softmax: false",
            ["2: 'moe_router_pre_softmax' has no effect with moe_router_type sigmoid; it is for topk"],
        ),
        (
            "moe_router_type: top_p\nmoe_router_topk_scaling_factor: 2.5",
            [f"2: 'moe_router_topk_scaling_factor' has no effect with moe_router_type top_p; {SCALED}"],
        ),
        (
            "moe_router_type: expert_choice\nmoe_normalize_top_k: true",
            [f"2: 'moe_normalize_top_k' has no effect with moe_router_type expert_choice; {NORMALIZED}"],
        ),
        (
            "moe_router_type: topk\nmoe_router_num_groups: 2\nmoe_router_group_topk: 1",
            [
                "3: 'moe_router_group_topk' has no effect with moe_router_type topk; it is for sigmoid",
                "2: 'moe_router_num_groups' has no effect with moe_router_type topk; it is for sigmoid",
            ],
        ),
        ("moe_lore_rank: 8", ["1: 'moe_lore_rank' has no effect with moe_expert_type grouped; it is for structmoe"]),
        ("moe_decomposition_rank: 8", ["1: 'moe_decomposition_rank' has no effect with moe_expert_type grouped; it is for decomposed"]),
        (UNROUTED + "moe_lore_top_k: 2", ["4: 'moe_lore_top_k' has no effect with moe_lore_routed: false, because then no router chooses LoREs"]),
        (
            UNROUTED + "moe_lore_normalize: true",
            ["4: 'moe_lore_normalize' has no effect with moe_lore_routed: false, because then no router chooses LoREs"],
        ),
        (
            "moe_block_wise_temperature: 2.0",
            ["1: 'moe_block_wise_temperature' has no effect, because moe_losses does not name block_wise_selection or neighbour_selection"],
        ),
        (
            "moe_copy_experts: 1\nmoe_zero_computation_balance: 0.5",
            ["2: 'moe_zero_computation_balance' has no effect, because moe_losses does not name heterogeneous_load_balance"],
        ),
        ("moe_copy_experts: 1\nmoe_zero_computation_balance: 0.5\nmoe_losses: {heterogeneous_load_balance: 0.1}", []),
        ("moe_router_eval_k: 1", ["1: 'moe_router_eval_k' has no effect with moe_router_type sinkhorn; it is for smoe_dropout"]),
        ("moe_losses: {neighbour_selection: 0.1}\nmoe_block_wise_temperature: 2.0", []),
        (
            "moe_router_type: top_p\nmoe_top_k: 2",
            ["2: 'moe_top_k' has no effect with moe_router_type top_p; this router chooses the number of experts itself"],
        ),
        ("moe_router_type: topk\nmoe_normalize_top_k: true", [f"2: 'moe_normalize_top_k' {OF_ONE_EXPERT}"]),
        ("moe_router_type: sigmoid\nmoe_normalize_top_k: true", [f"2: 'moe_normalize_top_k' {OF_ONE_EXPERT}"]),
        ("moe_router_type: topk\nmoe_router_pre_softmax: false", [f"2: 'moe_router_pre_softmax' {OF_ONE_EXPERT}"]),
        ("moe_router_type: topk\nmoe_router_pre_softmax: false\nmoe_expert_segments: 2", []),
        ("moe_expert_type: structmoe\nmoe_lore_normalize: true", [f"2: 'moe_lore_normalize' {OF_ONE_LORE}"]),
        ("moe_top_k: 2\nmoe_router_type: topk\nmoe_router_pre_softmax: false\nmoe_router_topk_scaling_factor: 2.5\nmoe_normalize_top_k: true", []),
        ("moe_router_type: top_p\nmoe_normalize_top_k: true\nmoe_jitter_eps: 0.1", []),
        ("moe_expert_type: structmoe\nmoe_lore_top_k: 2\nmoe_lore_normalize: true", []),
    ],
)
def test_idle_keys_give_notices(given: str, notices: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yml").write_text(BASE)
    Path("given.yml").write_text(given + "\n")
    assert list(load_config(["base", "given"]).notices) == [f"given.yml:{notice}" for notice in notices]


DENSE = {
    "moe_losses": "{load_balance: 0.1}",
    "moe_router_type": "topk",
    "moe_jitter_eps": "0.1",
    "moe_layers": "[1]",
    "moe_expert_interval": "2",
    "moe_first_k_dense_layers": "1",
    "moe_ffn_hidden_size": "32",
    "moe_lore_rank": "8",
    "moe_block_wise_temperature": "2.0",
}


@pytest.mark.parametrize("key", DENSE)
def test_what_is_said_of_experts_that_are_not_there_gives_a_notice(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yml").write_text(BASE.replace("moe_num_experts: 4", "moe_num_experts: 1\nmoe_top_k: 1"))
    Path("given.yml").write_text(f"{key}: {DENSE[key]}\n")
    assert load_config(["base", "given"]).notices == (f"given.yml:1: '{key}' has no effect: moe_num_experts is 1, so every layer is dense",)


@pytest.mark.parametrize(
    "given",
    [
        {"moe_num_experts_by_layer": [8, 16], "moe_router_type": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_top_k": 4},
        {"moe_num_experts": 4, "moe_expert_type": "structmoe", "moe_lore_routed": False, "moe_num_lores": 8, "moe_lore_rank": 32},
        {"moe_num_experts": 4, "moe_expert_type": "structmoe", "moe_num_lores": 8, "moe_lore_rank": 256},
    ],
)
def test_settings_at_the_edge_of_what_is_allowed(given: dict[str, Any]) -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
    assert load_values({**shape, **given}).notices == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"moe_router_type": "quantile_balancing", "moe_top_k": 4},
            "'moe_top_k' = 4: must be less than the number of experts in a layer (4): a token that has all experts leaves no choice to balance",
        ),
        (
            {"moe_router_type": "document_pool", "moe_top_k": 2, "moe_min_document_expert_pool": 1},
            "'moe_min_document_expert_pool' = 1: must be from the number of experts of a token (2) to the number in a layer (4)",
        ),
        (
            {"moe_router_type": "document_pool", "moe_eval_document_expert_pool": 5},
            "'moe_eval_document_expert_pool' = 5: must be from the number of experts of a token (1) to the number in a layer (4)",
        ),
        (
            {"moe_router_type": "document_pool", "moe_min_document_expert_pool": 3, "moe_max_document_expert_pool": 2},
            "'moe_min_document_expert_pool' = 3: must be at most moe_max_document_expert_pool (2)",
        ),
        ({"moe_router_type": "expert_threshold", "moe_router_threshold_decay": 1.0}, "'moe_router_threshold_decay' = 1.0: must be less than 1"),
        ({"moe_router_type": "quantile_balancing", "moe_router_quantile_balancing_ema": -0.5}, "must be at least 0"),
        (
            {"moe_router_type": "recurrent", "pipe_parallel_size": 2},
            "'pipe_parallel_size' = 2: must be 0 or 1 with moe_router_type recurrent: its GRU is one set of weights for all layers",
        ),
    ],
)
def test_routers_say_what_they_cannot_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(**{"moe_num_experts": 4, **given})
    assert message in str(error.value)
