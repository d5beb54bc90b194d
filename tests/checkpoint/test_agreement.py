"""What no tensor's shape shows: another architecture, other steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.agreement import FREE_KEYS, LATER_KEYS, POSITION_KEYS, batch_change, check_architecture
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.manifest import write_manifest
from megatron.checkpoint.save import resolved_config_document
from megatron.config import Batch, ConfigError, config_from_dict
from megatron.config.messages import show

KEYS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "moe_num_experts": 4,
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
}


def flat(**changes: Any) -> dict[str, Any]:
    return config_from_dict({**KEYS, **changes}).flat()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """What a checkpoint of KEYS that two processes wrote says about itself."""
    (tmp_path / "configs").mkdir()
    for name, text in resolved_config_document(flat()).items():
        (tmp_path / "configs" / name).write_text(text)
    write_manifest(tmp_path, {}, {"world_size": 2})
    return tmp_path


def test_the_same_architecture(path: Path) -> None:
    check_architecture(path, flat())
    check_architecture(
        path,
        flat(
            seq_length=16, hidden_dropout=0.1, moe_losses={"z_loss": 0.1}, moe_block_wise_temperature=4.0, train_batch_size=32, precision="bfloat16"
        ),
    )


@pytest.mark.parametrize(
    ("key", "value", "stored"),
    [
        ("activation", "relu", "gelu"),
        ("moe_top_k", 2, 1),
        ("gpt_j_residual", True, False),
        ("rotary_pct", 0.5, 1.0),
        ("moe_normalize_top_k", True, False),
        ("layernorm_epsilon", 1e-6, 1e-5),
        ("head_dim", 32, 16),
    ],
)
def test_a_difference_without_a_shape_is_named(key: str, value: Any, stored: Any, path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(**{key: value}))
    assert caught.value.problems == [f"'{key}' = {show(value)}: the model in {path} was trained with {show(stored)}"]


def test_what_follows_from_a_key_that_differs_is_not_named_as_well(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(hidden_size=128, gpt_j_residual=True))
    assert caught.value.problems == [
        f"'hidden_size' = 128: the model in {path} was trained with 64",
        f"'gpt_j_residual' = true: the model in {path} was trained with false",
    ]


def test_every_difference_is_named(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(activation="relu", moe_top_k=2))
    assert len(caught.value.problems) == 2


def test_every_free_key_is_a_key() -> None:
    assert set(flat()) >= FREE_KEYS | POSITION_KEYS


def test_training_further_may_read_longer_texts(path: Path) -> None:
    """Going on may only where no weights and no angles change: more rotary positions. Keys that say nothing about positions are refused in both."""
    longer = {"rotary_emb_base": 500_000, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 64}
    scaling = flat(**longer)["rope_scaling"]
    sentences = [
        f"'max_position_embeddings' = 64: the model in {path} was trained with 32",
        f"'rotary_emb_base' = 500000: the model in {path} was trained with 10000",
        f"'rope_scaling' = {show(scaling)}: the model in {path} was trained with null",
    ]
    assert check_architecture(path, flat(**longer), finetune=True) == [f"{sentence}." for sentence in sentences]
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(**longer))
    assert caught.value.problems == [f"{sentence}; finetune: true may change it" for sentence in sentences[1:]]
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(**longer, activation="relu"), finetune=True)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["'activation'"]


def test_what_the_checkpoint_does_not_know_is_not_compared(path: Path) -> None:
    file = path / "configs/resolved.json"
    file.write_text(json.dumps({"activation": "relu"}))
    check_architecture(path, flat(activation="relu", moe_top_k=2))
    file.unlink()
    check_architecture(path, flat(activation="relu"))


def test_a_damaged_configuration(path: Path) -> None:
    (path / "configs/resolved.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"resolved\.json cannot be read"):
        check_architecture(path, flat())


def test_another_batch_is_said(path: Path) -> None:
    assert batch_change(path, Batch(micro=4, accumulation=1, global_=16)) is None
    sentence = (
        f"{path} was trained with 16 sequences in each step; this run uses 24. The learning-rate schedule continues from the step "
        "number, and the data from the number of sequences already read."
    )
    assert batch_change(path, Batch(micro=4, accumulation=6, global_=24)) == sentence


@pytest.mark.parametrize("stored", [{}, {"train_batch_size": "many"}, {"train_batch_size": 3}, {"seed": 1}])
def test_a_checkpoint_that_does_not_say_its_batch(stored: dict[str, Any], path: Path) -> None:
    (path / "configs/resolved.json").write_text(json.dumps(stored))
    assert batch_change(path, Batch(4, 6, 24)) is None


def test_another_program_s_checkpoint_does_not_say_its_batch(path: Path) -> None:
    (path / "manifest.json").unlink()
    assert batch_change(path, Batch(4, 6, 24)) is None


def test_the_same_number_said_and_left_out_is_the_same(path: Path) -> None:
    """Four heads of hidden_size 64 have 16 dimensions each, and without num_kv_heads there are four key heads."""
    check_architecture(path, flat(head_dim=16, num_kv_heads=4))


def test_a_checkpoint_from_before_there_was_such_a_key(path: Path) -> None:
    file = path / "configs" / "resolved.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if key not in LATER_KEYS}))
    check_architecture(path, flat())
    with pytest.raises(ConfigError) as caught:
        check_architecture(path, flat(head_dim=32, use_bias_in_attn_linear=False, add_qkv_bias=True, reordered_norm=True))
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "'head_dim' = 32",
        "'use_bias_in_attn_linear' = false",
        "'add_qkv_bias' = true",
        "'reordered_norm' = true",
    }
