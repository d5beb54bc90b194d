"""Keys under other names act as the ones they stand for, and mistakes are told under the name that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.aliases import IMPLIED, OTHER_WORDS, RENAMED
from megatron.config.loader import LoadedConfig, config_from_dict, load_config, load_values
from megatron.config.neox import OWNER
from megatron.config.section import ConfigError

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
# A value for each of the other names.
VALUES: dict[str, Any] = {
    "num_processes": 2,
    "expert_interval": 2,
    "gas": 2,
    "save_interval": 500,
    "lora_rank": 16,
    "moe_lora_experts": 4,
    "lora_top_k": 2,
    "lora_interaction_type": "geglu",
    "moe_lora_aux_loss_coeff": 0.003,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "kv_channels": 24,
}
MOE = {"moe_num_experts": 4}
# What else a name needs beside it.
BESIDE: dict[str, dict[str, Any]] = {"moe_lora_aux_loss_coeff": {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 8}}
# As in the fork's own files: a StructMoE of eight experts with eight LoREs each.
FORK = """
"moe_router_type": "topk"
"moe_num_experts": 8
"moe_top_k": 1
"lora_rank" : 128
"moe_lora_experts" : 8
"lora_top_k" : 1
"moe_lora_aux_loss_coeff" : 0.00
"lora_interaction_type" : 'addition'
"moe_aux_loss_coeff": 0.01
"moe_z_loss_coeff": 0.0
"mlp_type": "regular"
"""


def load(folder: Path, text: str, *overrides: str) -> LoadedConfig:
    lines = [f"{key}: {value}" for key, value in MODEL.items() if f"{key}:" not in text]
    (folder / "base.yml").write_text("\n".join(lines) + "\n")
    (folder / "a.yml").write_text(text)
    return load_config(["base.yml", "a.yml"], overrides)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_other_name_is_tried() -> None:
    assert set(VALUES) == set(RENAMED)
    assert {old for old, _, _ in IMPLIED} <= set(RENAMED)
    assert {key for _, key, _ in IMPLIED} <= set(OWNER)


@pytest.mark.parametrize("old", RENAMED)
def test_it_acts_exactly_as_the_key_that_it_stands_for(old: str) -> None:
    outer, _, inner = RENAMED[old].partition(".")
    value = OTHER_WORDS.get(old, {}).get(VALUES[old], VALUES[old])
    implied = {key: given for name, key, given in IMPLIED if name == old}
    ours = {**MODEL, **MOE, **BESIDE.get(old, {}), outer: {inner: value} if inner else value, **implied}
    loaded = load_values({**MODEL, **MOE, **BESIDE.get(old, {}), old: VALUES[old]})
    assert loaded.config == config_from_dict(ours)
    assert loaded.config.given() == config_from_dict(ours).given()
    assert loaded.without_section == {old: VALUES[old]}
    assert loaded.notices == load_values(ours).notices


@pytest.mark.parametrize("old", RENAMED)
def test_null_asks_for_nothing(old: str) -> None:
    assert config_from_dict({**MODEL, old: None}) == config_from_dict(MODEL)


@pytest.mark.parametrize("old", RENAMED)
def test_both_names_together_are_an_error(old: str, here: Path) -> None:
    outer, _, inner = RENAMED[old].partition(".")
    new = f"{outer}: {{{inner}: 0.5}}" if inner else f"{outer}: {OTHER_WORDS.get(old, {}).get(VALUES[old], VALUES[old])}"
    beside = "".join(f"{key}: {value}\n" for key, value in BESIDE.get(old, {}).items())
    with pytest.raises(ConfigError) as caught:
        load(here, f"moe_num_experts: 4\n{new}\n{old}: {VALUES[old]}\n{beside}")
    assert caught.value.problems == [f"a.yml:3: '{old}' is another name of '{RENAMED[old]}', which is given too; keep one of them"]


def test_both_names_in_two_files_are_an_error_too(here: Path) -> None:
    (here / "b.yml").write_text("moe_lore_rank: 8\n")
    (here / "c.yml").write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "lora-rank: 8\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["b", "c"])
    assert caught.value.problems == ["c.yml:6: 'lora_rank' is another name of 'moe_lore_rank', which is given too; keep one of them"]


def test_a_file_of_the_fork_is_a_structmoe(here: Path) -> None:
    loaded = load(here, FORK)
    moe = loaded.config.moe
    assert (moe.moe_expert_type, moe.moe_num_lores, moe.moe_lore_top_k, moe.moe_lore_rank) == ("structmoe", 8, 1, 128)
    assert moe.moe_lore_interaction == "entangled"
    assert moe.moe_losses == {"load_balance": 0.01, "z_loss": 0.0}
    assert loaded.notices == ()
    assert load(here, FORK + "moe_expert_type: grouped\n").config.moe.moe_expert_type == "grouped"
    assert load(here, FORK.replace("addition", "GEGLU")).config.moe.moe_lore_interaction == "gated"
    balanced = {"load_balance": 0.01, "lore_balance": 0.003, "z_loss": 0.0}
    assert load(here, FORK.replace('coeff" : 0.00', 'coeff" : 0.003')).config.moe.moe_losses == balanced
    assert load(here, FORK, "moe_lora_aux_loss_coeff=0.003").config.moe.moe_losses == balanced


def test_a_balance_of_0_is_none(here: Path) -> None:
    for text in ("moe_lora_aux_loss_coeff: 0.0\n", "moe_lora_aux_loss_coeff: 0\nlora_interaction_type: addition\n"):
        loaded = load(here, text)
        assert (loaded.config.moe.moe_losses, loaded.notices) == ({}, ())
    assert load(here, "moe_lora_aux_loss_coeff: 0.1\n", "moe_lora_aux_loss_coeff=0").config.moe.moe_losses == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("moe_num_experts: 4\nlora_rank: 0\n", "a.yml:2: 'lora_rank' = 0: must be at least 1"),
        ("moe_num_experts: 4\nlora_rank: big\n", "a.yml:2: 'lora_rank' = 'big': must be a whole number"),
        (
            "moe_num_experts: 4\nlora_top_k: 9\nmoe_lora_experts: 4\n",
            "a.yml:2: 'lora_top_k' = 9: must be at most moe_lora_experts (4)",
        ),
        (
            "moe_lora_experts: 4\n",
            "a.yml:1: 'moe_expert_type (set by moe_lora_experts)' = 'structmoe': needs moe_num_experts of 2 or more; with 1 every layer is dense",
        ),
        ("lora_interaction_type: sum\n", "a.yml:1: 'lora_interaction_type' = 'sum': must be 'entangled', 'standalone' or 'gated'"),
        (
            "moe_num_experts: 4\nmoe_lora_aux_loss_coeff: 0.1\n",
            "a.yml:2: 'moe_lora_aux_loss_coeff' = 0.1: needs moe_expert_type: structmoe with routed LoREs",
        ),
        ("moe_aux_loss_coeff: -1\n", "a.yml:1: 'moe_aux_loss_coeff' = -1: must be 0 or more"),
        ("moe_aux_loss_coeff: high\n", "a.yml:1: 'moe_aux_loss_coeff' = 'high': must be a number"),
        ("moe_aux_loss_coeff: 1\nmoe_losses: 3\n", "a.yml:2: 'moe_losses' = 3: must be a dictionary"),
        ("save_interval: 2.5\n", "a.yml:1: 'save_interval' = 2.5: must be a whole number of steps, 1 or more"),
        ("deepspeed_extra_args: {bf16: {enabled: 1}}\n", "a.yml:1: 'deepspeed_extra_args.bf16.enabled' = 1: must be true or false"),
        (
            "bf16: {enabled: true}\ndeepspeed_extra_args:\n  bf16: {enabled: true}\n",
            "a.yml:3: 'deepspeed_extra_args.bf16' is another name of 'bf16', which is given too; keep one of them",
        ),
    ],
)
def test_mistakes_are_told_under_the_written_name(text: str, problem: str, here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(here, text)
    assert caught.value.problems == [problem]


class TestOverrides:
    def test_an_override_under_either_name_wins_over_a_file_under_either(self, here: Path) -> None:
        text = "moe_num_experts: 4\nmoe_lora_experts: 8\n"
        for name in ("moe_num_lores", "moe_lora_experts"):
            for written in (text, text.replace("moe_lora_experts", "moe_num_lores")):
                assert load(here, written, f"{name}=3").config.moe.moe_num_lores == 3

    def test_nested_ones_as_well(self, here: Path) -> None:
        for name in ("moe_losses.load_balance", "moe_aux_loss_coeff"):
            assert load(here, "moe_aux_loss_coeff: 0.01\nmoe_z_loss_coeff: 0.1\n", f"{name}=0.5").config.moe.moe_losses == {
                "load_balance": 0.5,
                "z_loss": 0.1,
            }

    def test_they_imply_what_the_name_implies(self, here: Path) -> None:
        assert load(here, "moe_num_experts: 4\n", "moe_lora_experts=8").config.moe.moe_expert_type == "structmoe"

    def test_mistakes_keep_the_name(self, here: Path) -> None:
        for overrides, problem in (
            (["lora_rank=0"], "command line: 'lora_rank' = 0: must be at least 1"),
            (["lora_rank=4", "moe_lore_rank=4"], "command line: 'moe_lore_rank' is given twice"),
            (["moe_lore_rank=0"], "command line: 'moe_lore_rank' = 0: must be at least 1"),
        ):
            with pytest.raises(ConfigError) as caught:
                load(here, "moe_num_experts: 4\nlora-rank: 8\n", *overrides)
            assert caught.value.problems == [problem]

    def test_deepspeed_s_settings_by_their_outer_or_inner_name(self, here: Path) -> None:
        text = "deepspeed_extra_args: {comms_logger: {enabled: true}, log_level: error}\n"
        for override in ("comms_logger.enabled=false", "deepspeed_extra_args.comms_logger={enabled: false}"):
            config = load(here, text, override).config
            assert config.deepspeed.comms_logger is not None
            assert config.deepspeed.comms_logger.enabled is False
            assert config.deepspeed.deepspeed_extra_args == {"log_level": "error"}
