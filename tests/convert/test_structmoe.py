"""StructMoEForCausalLM computes what our model computes, for everything that can be trained here, and every weight comes back as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron.config import NeoXConfig, config_from_dict
from megatron.convert.architecture import Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.architectures.structmoe import StructMoE
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import check_complete, to_ours, to_theirs
from megatron.convert.shapes import checked, model_shapes
from megatron.testing.tiny import tiny_config
from tests.convert.structmoe_cases import CASES, MOE, STRUCTMOE
from tests.convert.structmoe_model import ROOMY, VOCAB, our_model, pair, tokens

# Sums in another order: the largest difference over all cases was 1e-5, with logits of up to 9.
TOLERANCE = {"rtol": 0.0, "atol": 3e-5}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_every_weight_there_and_back(name: str) -> None:
    source, gpt, state, model = pair(**CASES[name])
    with torch.no_grad():
        expected, got = gpt(tokens()).logits_BSV, model(tokens()).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(parameter.numel() for parameter in gpt.parameters())

    table = list(StructMoE().table(source))
    check_complete(table, state)
    shapes = model_shapes(source)
    back = {named.name: checked(named.name, named.tensor, shapes) for named in to_ours(table, model.state_dict().__getitem__)}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CASES)
def test_keys_of_an_export_describe_the_same_model(name: str) -> None:
    """From config.json to keys and from these to settings: nothing changes, and the model that they build takes the weights and gives the logits."""
    source, gpt, state, model = pair(**CASES[name])
    written = json.loads(model.config.to_json_string())
    config = config_from_dict(StructMoE().keys(written))
    again = StructMoE().settings(Source(config, VOCAB))
    settings = StructMoE().settings(source)
    if not config.moe.has_experts:
        again.pop("moe_losses", None)
    assert again == settings
    rebuilt = our_model(config)
    rebuilt.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens()).logits_BSV, gpt(tokens()).logits_BSV)


@pytest.mark.parametrize(
    "name",
    ["gqa", "window", "window alibi", "window rpe gqa", "alibi scaled", "rpe scaled in some layers", "qk per head rmsnorm", "narrow heads gqa"],
)
def test_attention_written_out_gives_the_same(name: str) -> None:
    _, gpt, _, model = pair(attention="eager", **CASES[name])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, gpt(tokens()).logits_BSV, **TOLERANCE)


@pytest.mark.parametrize(
    "name",
    ["rotary half", "sinusoidal", "structmoe swiglu both", "sigmoid groups", "residual and shared", "rotary llama3", "qk all heads rmsnorm gqa"],
)
def test_the_same_in_float64(name: str) -> None:
    """To twelve digits, so that what a tolerance could hide is not there."""
    _, gpt, _, model = pair(dtype=torch.float64, **CASES[name])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, gpt(tokens()).logits_BSV, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("topk", []),
        ("sigmoid", ["e_score_correction_bias"]),
        ("quantile balancing", ["e_score_correction_bias"]),
        ("expert threshold", ["e_score_threshold", "threshold_steps"]),
    ],
)
def test_only_what_balances_routers_is_kept_exact(name: str, buffers: list[str]) -> None:
    source = Source(tiny_config(**{**ROOMY, **CASES[name]}), VOCAB)
    exact = [entry.theirs for entry in StructMoE().table(source) if entry.exact]
    assert exact == [(f"model.layers.{layer}.mlp.gate.{buffer}",) for layer in range(2) for buffer in buffers]


def test_pools_outside_training_are_an_obstacle() -> None:
    """They follow the text, and a cache of transformers has no place for them."""
    changes = {**MOE, "moe_router_type": "document_pool"}
    assert not list(StructMoE().obstacles(Source(tiny_config(**changes, moe_eval_document_expert_pool=4), VOCAB)))
    (sentence,) = StructMoE().obstacles(Source(tiny_config(**changes, moe_eval_document_expert_pool=3), VOCAB))
    assert sentence.startswith("moe_eval_document_expert_pool: 3 (transformers' caches have no place for a pool that follows the text")


@pytest.mark.parametrize(
    ("changes", "whole"), [({"moe_num_experts": None, "moe_num_experts_by_layer": [4, 8]}, None), ({"moe_zero_experts": 2}, 6)], ids=str
)
def test_a_pool_is_an_obstacle_if_any_layer_has_more_experts_to_choose(changes: dict[str, Any], whole: int | None) -> None:
    keys = {**MOE, "moe_router_type": "document_pool", **changes}
    assert list(StructMoE().obstacles(Source(tiny_config(**keys, moe_eval_document_expert_pool=4), VOCAB)))
    assert not list(StructMoE().obstacles(Source(tiny_config(**keys, moe_eval_document_expert_pool=whole), VOCAB)))


# ---------------------------------------------------------------- what cannot be done


def test_everything_built_in_can_be_exported() -> None:
    for changes in CASES.values():
        assert not list(StructMoE().obstacles(Source(tiny_config(**{**ROOMY, **changes}), VOCAB)))


def test_no_class_takes_numbers_of_experts_by_layer_for_a_dense_model() -> None:
    source = Source(tiny_config(**{**ROOMY, **CASES["experts by layer"]}), VOCAB)
    assert [name for name, architecture in ARCHITECTURES.items() if not list(architecture.obstacles(source))] == ["structmoe"]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "moe_router_type",
            "moe_router_type: toy (StructMoEForCausalLM has topk, sinkhorn, sigmoid, top_p, expert_choice, quantile_balancing, expert_threshold, "
            "document_pool, recurrent, smoe_dropout; what a plugin adds cannot be exported)",
        ),
        (
            "moe_expert_type",
            "moe_expert_type: toy (StructMoEForCausalLM has grouped, structmoe, decomposed; what a plugin adds cannot be exported)",
        ),
    ],
)
def test_a_component_of_a_plugin_is_an_obstacle(key: str, sentence: str) -> None:
    config = tiny_config(**MOE)
    with_plugin = config.model_copy(update={"moe": config.moe.model_copy(update={key: "toy"})})
    assert list(StructMoE().obstacles(Source(with_plugin, VOCAB))) == [sentence]
    dense = tiny_config()
    without_experts = dense.model_copy(update={"moe": dense.moe.model_copy(update={key: "toy"})})
    assert not list(StructMoE().obstacles(Source(without_experts, VOCAB)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts_by_layer": [1, 4], "num_hidden_layers": 2},
            r"num_experts_by_layer: \[1, 4\] cannot be represented: a layer must have 0 experts, or 2 or more\.",
        ),
        (
            {"position_bias_scale": [1.0, 1.0, 3.0], "num_hidden_layers": 3},
            r"position_bias_scale: \[1\.0, 1\.0, 3\.0\] cannot be represented: each must be 1 or the number of its layer\.",
        ),
        (
            {"norm_type": "batchnorm"},
            r"The settings of this StructMoEForCausalLM contradict each other: norm_type = 'batchnorm': must be one of layernorm",
        ),
    ],
)
def test_a_config_json_that_no_keys_of_ours_describe(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        StructMoE().keys(settings)


def test_tables_of_relative_positions_that_differ_between_layers() -> None:
    """Ours is one for all layers; a checkpoint that says otherwise would lose something."""
    source, _, state, _ = pair(pos_emb="rpe")
    changed = {**state, "sequential.3.attention.rpe.weight": state["sequential.3.attention.rpe.weight"] + 1}
    message = "sequential.3.attention.rpe.weight differs from the first layer's, but the other architecture has a single weight for all layers"
    with pytest.raises(ConversionError, match=message):
        list(to_theirs(StructMoE().table(source), changed.__getitem__))


def test_losses_that_are_not_computed_there_still_come_back() -> None:
    losses = {"load_balance": 0.01, "neighbour_selection": 0.1, "lore_balance": 0.02}
    config: NeoXConfig = tiny_config(**{**STRUCTMOE, "moe_losses": losses, "moe_block_wise_temperature": 2.0})
    keys = StructMoE().keys(StructMoE().settings(Source(config, VOCAB)))
    assert keys["moe_losses"] == losses
    assert keys["moe_block_wise_temperature"] == 2.0
