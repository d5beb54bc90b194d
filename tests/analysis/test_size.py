"""Sizes of configuration files, and which setting makes one model as large as another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron.analysis.size import Layout, ModelSize, matches, memory_per_process, read_sizes, size_of
from megatron.analysis.vocabulary import stated_vocabulary
from megatron.config.loader import load_values
from megatron.config.section import ConfigError
from megatron.config.size import flops_per_token
from tests.configs.test_shipped import CONFIGS

PAPER = {
    "num_layers": 1,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "no_weight_tying": True,
}
TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
NESTED = {"moe_expert_type": "structmoe", "moe_num_lores": 8, "moe_lore_rank": 16}


def sized(name: str = "model", **values: Any) -> ModelSize:
    return size_of(name, load_values(values), Layout(vocabulary=256))


def found(model: ModelSize, other: ModelSize, **how: bool) -> dict[str, tuple[int, int, int]]:
    return {match.key: (match.value, match.difference, match.without_routers) for match in matches(model, other, **how)}


# ---------------------------------------------------------------- matches


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"moe_num_experts": 8, "moe_num_lores": 8, "moe_lore_rank": 40}, "moe_lore_rank", 128),
        ({"moe_num_experts": 8, "moe_num_lores": 3, "moe_lore_rank": 128}, "moe_num_lores", 8),
        ({"moe_num_experts": 2, "moe_num_lores": 8, "moe_lore_rank": 128}, "moe_num_experts", 8),
    ],
)
def test_8_experts_with_8_lores_of_rank_128_match_13_experts_exactly(given: dict[str, int], key: str, value: int) -> None:
    """Outside the routers; those of 64 LoREs and 8 experts have 59 rows more than those of 13 experts."""
    nested, plain = sized(**PAPER, **{**NESTED, **given}), sized(**PAPER, moe_num_experts=13)
    assert found(nested, plain)[key] == (value, 59 * 1024, 0)


def test_latent_experts_match_experts_with_lores() -> None:
    """Two layers. 4 experts of width 256 with 8 LoREs of rank 16, and 16 experts that read and write Z numbers, with two projections."""
    nested, latent = sized(**TINY, moe_num_experts=4, **NESTED), sized(**TINY, moe_num_experts=16, moe_latent_size=16)
    value, difference, without_routers = found(latent, nested)["moe_latent_size"]
    of_layer = 4 * (2 * 64 * 256 + 8 * 16 * (64 + 256))
    assert value == min(range(1, 65), key=lambda z: abs(2 * ((16 * 2 * 256 + 2 * 64) * z + 16 * 64) - 2 * (of_layer + 4 * 64 + 4 * 8 * 64)))
    assert without_routers == 2 * ((16 * 2 * 256 + 2 * 64) * value - of_layer)
    assert difference == without_routers + 2 * (16 * 64 - 4 * 64 - 4 * 8 * 64)


@pytest.mark.parametrize("how", [{}, {"active": True}])
@pytest.mark.parametrize(
    "given",
    [
        NESTED,
        {**NESTED, "moe_lore_routed": False},
        {"moe_expert_type": "decomposed"},
        {},
        {"moe_num_experts": 6, "moe_num_shared_experts": 1},
        {"moe_latent_size": 48},
        {**NESTED, "moe_latent_size": 48, "moe_constant_experts": 2},
        {"moe_router_type": "smoe_dropout"},
    ],
)
def test_no_neighbour_of_a_match_is_nearer(given: dict[str, Any], how: dict[str, bool]) -> None:
    keys = {"moe_num_experts": 6, "moe_top_k": 2, **given}
    model, other = sized(**TINY, **keys), sized(**TINY, ffn_hidden_size=256 * 3 + 50 if how else 256 * 9 + 50)
    target = other.count.active_sum if how else other.count.total_sum
    solutions = matches(model, other, **how)
    assert solutions
    for match in solutions:

        def size(value: int, key: str = match.key) -> int:
            count = sized(**TINY, **{**keys, key: value}).count
            return count.active_sum if how else count.total_sum

        assert size(match.value) == match.reached == target + match.difference
        others = [value for value in (match.value - 1, match.value + 1) if value > 1 and (match.key != "moe_top_k" or value <= 6)]
        assert all(abs(size(value) - target) >= abs(match.difference) for value in others)


def test_keys_that_do_not_change_the_active_size_are_left_out() -> None:
    model, other = sized(**TINY, moe_num_experts=8, moe_top_k=2, **NESTED), sized(**TINY, moe_num_experts=8, moe_top_k=3, **NESTED)
    assert found(model, other, active=True)["moe_top_k"] == (3, 0, 0)
    assert set(found(model, other, active=True)) <= {"moe_top_k", "moe_lore_rank", "moe_lore_top_k"}
    assert found(model, other) == dict.fromkeys(["moe_lore_rank"], (16, 0, 0)) | {"moe_num_lores": (8, 0, 0), "moe_num_experts": (8, 0, 0)}


@pytest.mark.parametrize("how", [{}, {"active": True}])
@pytest.mark.parametrize(
    "given",
    [
        {"moe_router_type": "sigmoid", "moe_num_experts": 8, "moe_top_k": 2, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_type": "sigmoid", "moe_num_experts": 8, "moe_top_k": 2, "moe_router_num_groups": 8, "moe_router_group_topk": 2},
        {"moe_num_experts": 8, "moe_top_k": 2, **NESTED, "moe_lore_routed": False},
        {"moe_num_experts": 8, "moe_top_k": 2, **NESTED, "moe_lore_routed": False, "moe_lore_interaction": "standalone", "moe_lore_rank": 2},
    ],
)
def test_every_match_is_a_configuration(given: dict[str, Any], how: dict[str, bool]) -> None:
    """Groups divide the number of experts, and a LoRE of all ranks is not wider than its matrix."""
    model, solutions = sized(**TINY, **given), []
    for width in range(64, 4096, 301):
        for match in matches(model, sized(**TINY, ffn_hidden_size=width), **how):
            changed = sized(**TINY, **{**given, match.key: match.value}).count
            assert match.reached == (changed.active_sum if how else changed.total_sum)
            solutions.append(match)
    assert len(solutions) >= 3


def test_what_cannot_be_reached_has_no_solution() -> None:
    assert not matches(sized(**TINY, moe_num_experts=4), sized(**TINY))


def test_a_model_without_experts_has_nothing_to_match_with() -> None:
    with pytest.raises(
        ConfigError,
        match=r"mine: has no experts, so it has no key \(number of experts or LoREs, rank\) that could match it to "
        r"theirs",
    ):
        matches(sized("mine", **TINY), sized("theirs", **TINY))


# ---------------------------------------------------------------- sizes


def test_what_is_measured() -> None:
    shape = {**TINY, "moe_num_experts": 4, "checkpoint_activations": True, "precision": "bfloat16", "zero_optimization": {"stage": 1}}
    one = size_of("a", load_values(shape), Layout(vocabulary=250, processes=4))
    assert one.padded_vocabulary == 256
    assert one.flops == flops_per_token(one.config.model, one.config.moe, 256)
    assert one.memory == memory_per_process(one.config, one.count.total_sum, 4)
    assert one.memory.optimizer == 3 * one.count.total_sum
    assert size_of("a", load_values(shape), Layout(vocabulary=250, processes=4, zero_stage=2)).memory.gradients == -(-one.count.total_sum * 2 // 4)


def test_the_vocabulary_is_that_of_the_layout_the_tokenizer_or_the_head(tmp_path: Path) -> None:
    file = tmp_path / "model.yml"
    body = "".join(f"{key}: {str(value).lower()}\n" for key, value in TINY.items())
    head = "# Parameters: 1 with a vocabulary of 1,024 (X's 1,000 tokens, padded)\n"

    def padded(text: str, layout: Layout) -> int:
        file.write_text(text)
        return read_sizes([str(file)], layout)[0].padded_vocabulary

    assert padded(head + body, Layout()) == 1024
    assert padded(head + body + "tokenizer_type: CharLevelTokenizer\n", Layout()) == 512
    assert padded(head + body, Layout(vocabulary=129)) == 256
    assert stated_vocabulary("# Parameters: some\n" + body) is None


def test_everything_wrong_in_any_file_is_said_at_once(tmp_path: Path) -> None:
    unknown, broken = tmp_path / "unknown.yml", tmp_path / "broken.yml"
    unknown.write_text("".join(f"{key}: {value}\n" for key, value in TINY.items()))
    broken.write_text("num_layers: 0\n")
    with pytest.raises(ConfigError) as error:
        read_sizes([str(unknown), str(broken), str(tmp_path / "absent.yml")], Layout())
    text = str(error.value)
    assert re.search(r"unknown\.yml: its vocabulary is not known \(vocab_file is not given\); give the number of tokens with --vocab", text)
    assert "broken.yml:1" in text
    assert "absent.yml: no such file" in text
    with pytest.raises(ConfigError) as error:
        read_sizes([str(unknown), str(unknown)], Layout())
    assert len(error.value.problems) == 1, "once, though the file was given twice"


def test_two_readings_of_the_paper_s_2_billion() -> None:
    """What the heads of configs/structmoe say of StructMoE's totals: 8 plain experts, and 4 with 32 LoREs of rank 64 at 50,304 tokens."""
    (base,) = read_sizes([str(CONFIGS / "structmoe/410M-13experts-fineweb.yml")], Layout())
    given = base.config.given()
    eight = size_of("8", load_values({**given, "moe_num_experts": 8}), Layout(vocabulary=128_256))
    assert eight.count.total_sum == 1_974_339_584
    lores = {"moe_expert_type": "structmoe", "moe_num_lores": 32, "moe_lore_rank": 64, "moe_num_experts": 4}
    assert size_of("4", load_values({**given, **lores}), Layout(vocabulary=50_304)).count.total_sum == 2_019_067_904
