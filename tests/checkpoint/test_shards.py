"""The table of how weights are cut up: both directions undo each other, and small examples by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.shards import RULES, merge_shards, rule_for, split_state
from megatron.config import config_from_dict
from megatron.model.gpt import build_model
from tests.checkpoint.upstream import cut_for_rank

BASE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "max_position_embeddings": 8, "no_weight_tying": True}
NARROW = "narrow grouped heads, biases without one on the output"
MODELS: dict[str, dict[str, Any]] = {
    "GPT": {"pos_emb": "learned"},
    "tied": {"no_weight_tying": False},
    "parallel residual": {"gpt_j_residual": True, "pos_emb": "rotary"},
    "Llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "intermediate_size": 48, "use_bias_in_attn_linear": False},
    "gated with biases": {"activation": "geglu", "intermediate_size": 48},
    "grouped queries with biases": {"num_kv_heads": 2},
    "wide heads": {"head_dim": 8},
    NARROW: {
        "head_dim": 2,
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "add_qkv_bias": True,
    },
    "heads that do not divide the width": {"hidden_size": 18, "head_dim": 4, "num_kv_heads": 2},
    "experts": {"moe_num_experts": 4, "intermediate_size": 32},
    "gated experts": {"moe_num_experts": 4, "intermediate_size": 48, "activation": "swiglu", "moe_expert_interval": 2},
    "StructMoE": {"moe_num_experts": 4, "intermediate_size": 32, "moe_expert_type": "structmoe", "moe_num_lores": 2, "moe_lore_rank": 4},
}


def whole(keys: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a model, every one of them different."""
    config = config_from_dict({**BASE, **keys})
    state = build_model(config.model, config.moe, 32, seed=1).state_dict()
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_merging_undoes_splitting(name: str, count: int) -> None:
    state, parallel = whole(MODELS[name]), MODELS[name].get("gpt_j_residual", False)
    if MODELS[name].get("num_kv_heads") == 2 and count == 4:
        state = whole({**MODELS[name], "num_attention_heads": 8, "num_kv_heads": 4})
    shards = split_state(state, count, parallel_residual=parallel)
    merged = merge_shards(shards, parallel_residual=parallel)
    assert merged.notices == ()
    assert list(merged.state) == list(state)
    for key, tensor in state.items():
        assert torch.equal(merged.state[key], tensor), key
    again = split_state(merged.state, count, parallel_residual=parallel)
    assert all(torch.equal(one[key], other[key]) for one, other in zip(shards, again, strict=True) for key in state)


BY_HAND = ["GPT", "Llama", "gated with biases", "grouped queries with biases", "experts", "wide heads", NARROW]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_same_as_cut_by_hand(name: str) -> None:
    keys, state = MODELS[name], whole(MODELS[name])
    width, gated = keys.get("head_dim", 4), keys.get("activation") in ("swiglu", "geglu")
    settings = {"queries": 4 * width, "kv": width * keys.get("num_kv_heads", 4), "gated": gated}
    by_hand = [cut_for_rank(state, rank, 2, **settings) for rank in range(2)]
    ours = split_state(state, 2, parallel_residual=False)
    for one, other in zip(by_hand, ours, strict=True):
        assert {key: tensor.shape for key, tensor in one.items()} == {key: tensor.shape for key, tensor in other.items()}
        assert all(torch.equal(one[key], other[key]) for key in state)


def test_every_rule_is_used() -> None:
    used = {rule_for(name).ending for keys in MODELS.values() for name in whole(keys)}
    assert {rule.ending for rule in RULES} - used == {r"\.attention\.rpe\.weight"}
    assert rule_for("sequential.2.attention.rpe.weight").dim == 1


def layer(rank: float, **changes: Tensor) -> dict[str, Tensor]:
    """One rank's attention with four query rows and two key rows, its biases, a norm."""
    prefix = "sequential.2."
    weights = {
        "attention.query_key_value.weight": torch.arange(8.0)[:, None].expand(8, 8) + 100 * rank,
        "attention.dense.weight": torch.full((8, 4), rank),
        "attention.dense.bias": torch.arange(8.0),
        "input_layernorm.weight": torch.ones(8),
        **changes,
    }
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def test_grouped_queries_of_two_ranks_by_hand() -> None:
    merged = merge_shards([layer(0), layer(1)], parallel_residual=False).state
    assert merged["sequential.2.attention.query_key_value.weight"][:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 104, 105, 6, 7, 106, 107]
    assert merged["sequential.2.attention.dense.weight"][0].tolist() == [0] * 4 + [1] * 4


def test_biases_of_rows_are_one_or_a_sum() -> None:
    name = "sequential.2.attention.dense.bias"
    assert merge_shards([layer(0), layer(1)], parallel_residual=False).state[name].tolist() == list(range(8))
    assert merge_shards([layer(0), layer(1)], parallel_residual=True).state[name].tolist() == list(range(0, 16, 2))


def test_copies_that_drifted_apart_are_averaged_and_said() -> None:
    shards = [layer(rank, **{"input_layernorm.weight": torch.tensor([1.0, 1.0 + 0.25 * rank])}) for rank in (0, 1)]
    merged = merge_shards(shards, parallel_residual=False)
    assert merged.state["sequential.2.input_layernorm.weight"].tolist() == [1.0, 1.125]
    assert merged.notices == (
        "1 weights have a copy in every tensor-parallel process, and the copies differ (by up to 0.25, in sequential.2.input_layernorm.weight): "
        "the mean of the copies is used.",
    )


def test_half_precision_is_kept() -> None:
    shards = [{name: tensor.half() for name, tensor in layer(rank).items()} for rank in (0, 1)]
    assert {tensor.dtype for tensor in merge_shards(shards, parallel_residual=True).state.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention.query_key_value.weight": torch.ones(7, 8)}, "has 7 rows and attention.dense 4 inputs. This is neither"),
        ({"attention.dense.weight": torch.ones(8, 5)}, "has different shapes on the tensor-parallel ranks: [8, 4], [8, 5]"),
        (
            {"attention.surprise.weight": torch.ones(3)},
            "the same weights: only one of them holds sequential.2.attention.surprise.weight",
        ),
    ],
)
def test_shards_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        merge_shards(
            [layer(0), layer(1, **change)] if "surprise" in message or "different" in message else [layer(0, **change)] * 2, parallel_residual=False
        )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"attention.surprise.weight": torch.ones(3)},
            "sequential.2.attention.surprise.weight: this program does not know how tensor-parallel processes divide this weight",
        ),
        ({"attention.qk_layernorm.weight": torch.ones(2, 4)}, "normalises over all heads of a process, so it can be neither merged nor divided"),
        ({"mlp.linear1.weight": torch.ones(3, 8)}, "cannot be divided, because the checkpoint does not hold sequential.2.mlp.linear2.weight"),
        ({"mlp.linear1.weight": torch.ones(3, 8), "mlp.linear2.weight": torch.ones(8, 2)}, "has 3 rows and linear2 2 inputs"),
        ({"attention.rpe.weight": torch.ones(3)}, "of shape [3] has no dimension 1, along which"),
    ],
)
def test_weights_that_no_rule_fits(extra: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        merge_shards([layer(0, **extra), layer(1, **extra)], parallel_residual=False)


def test_what_cannot_be_cut() -> None:
    with pytest.raises(CheckpointError, match=r"qk_layernorm\.scale of shape \[4, 4\] normalises over all heads"):
        split_state({"sequential.2.attention.qk_layernorm.scale": torch.ones(4, 4)}, 2, parallel_residual=False)
    with pytest.raises(
        CheckpointError, match=re.escape("word_embeddings.weight of shape [33, 4] cannot be divided into 2 equal parts along dimension 0")
    ):
        split_state({"sequential.0.word_embeddings.weight": torch.ones(33, 4)}, 2, parallel_residual=False)


def test_one_process_needs_no_rule() -> None:
    state = {"anything": torch.ones(3)}
    assert merge_shards([state], parallel_residual=False).state == state
    assert split_state(state, 1, parallel_residual=False) == [state]
