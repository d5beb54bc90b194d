"""Keys that no section has: other names, notices, refusals. That NeoX's keys are all there is test_neox_keys.py's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.aliases import RENAMED, TABLE, Ignored, Verdict, judge
from megatron.config.loader import config_from_dict, load_config, load_values
from megatron.config.neox import OWNER
from megatron.config.section import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}


def test_the_table_is_about_keys_that_no_section_has() -> None:
    assert not set(TABLE) & set(OWNER)
    assert not set(RENAMED) & (set(OWNER) | set(TABLE))
    assert {name.split(".")[0] for name in RENAMED.values()} <= set(OWNER)


@pytest.mark.parametrize("key", sorted(TABLE))
def test_null_never_asks_for_anything(key: str) -> None:
    verdict = judge(key, None)
    assert verdict is not None
    assert not verdict.refused


@pytest.mark.parametrize("key", sorted(key for key, entry in TABLE.items() if not isinstance(entry, Ignored)))
def test_a_refusal_is_a_sentence_about_the_key(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MODEL, key: "unheard-of"})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"'{key}' = 'unheard-of' is not supported: ")


def test_an_ignored_key_gives_a_notice_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text(
        "".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "rope_fusion: false\nscaled_masked_softmax_fusion: true\n"
    )
    assert load_config(["a"]).notices == (
        "a.yml:7: 'scaled_masked_softmax_fusion' has no effect here: attention and activations use PyTorch's fused operations if they exist",
    )


def test_a_dictionary_that_is_not_enabled_asks_for_nothing() -> None:
    for key in ("amp", "curriculum_learning", "autotuning", "elasticity", "soft_prompt_tuning"):
        assert judge(key, {"enabled": False, "more": 1}) == Verdict(False, "")
        verdict = judge(key, {"enabled": True})
        assert verdict is not None
        assert verdict.refused


@pytest.mark.parametrize("key", ["recompute", "contiguous_checkpointing", "sparse_gradients"])
def test_what_changes_no_result_stops_no_run(key: str) -> None:
    verdict = judge(key, True)
    assert verdict is not None
    assert not verdict.refused
    assert verdict.sentence.startswith(f"'{key}' has no effect here: ")


ABOUT_KEPT = "has no effect: it is about the inputs that checkpoint_activations: true keeps"


@pytest.mark.parametrize(
    ("keys", "notices"),
    [
        ({"checkpoint_activations": True, "checkpoint_in_cpu": True}, []),
        ({"partition_activations": False, "fp16": {"auto_cast": False}, "activation_checkpointing": {"profile": False}}, []),
        ({"partition_activations": True, "checkpoint_in_cpu": True}, [f"'partition_activations' {ABOUT_KEPT}", f"'checkpoint_in_cpu' {ABOUT_KEPT}"]),
        (
            {"checkpoint_activations": True, "partition_activations": True},
            ["'partition_activations' has no effect: model_parallel_size is 1, so there are no processes to divide the kept inputs among"],
        ),
        ({"checkpoint_activations": True, "partition_activations": True, "model_parallel_size": 2}, []),
        (
            {"checkpoint_activations": True, "partition_activations": True, "model_parallel_size": 2, "sequence_parallel": True},
            ["'partition_activations' has no effect: with sequence_parallel: true each process has its own part of the inputs anyway"],
        ),
        (
            {"checkpoint_activations": True, "activation_checkpointing": {"cpu_checkpointing": True, "synchronize_checkpoint_boundary": True}},
            [
                "'activation_checkpointing.synchronize_checkpoint_boundary' has no effect here: it makes the process wait for the GPU at each layer, "
                "and the results are the same"
            ],
        ),
        ({"recompute_modules": ["attention", "experts"]}, ["'recompute_modules' names experts, and no layer has experts"]),
        ({"recompute_modules": ["experts"], "moe_num_experts": 4}, []),
        (
            {"fp16": {"enabled": True, "auto_cast": True}},
            ["'fp16.auto_cast' has no effect here: it casts floating-point inputs of the model to fp16, and the inputs are token numbers"],
        ),
    ],
)
def test_keys_without_effect_beside_others_get_a_notice(keys: dict[str, Any], notices: list[str]) -> None:
    assert list(load_values({**MODEL, **keys}).notices) == notices


def test_a_notice_on_an_inner_key_says_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text("".join(f"{key}: {value}\n" for key, value in MODEL.items()) + "fp16:\n  enabled: true\n  auto_cast: true\n")
    assert [notice.split(" has ")[0] for notice in load_config(["a"]).notices] == ["a.yml:8: 'fp16.auto_cast'"]
