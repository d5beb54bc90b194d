"""Values that sections derive: precision, widths, batch sizes, schedule length."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import Batch, ConfigError, check_trainable, config_from_dict, resolve_batch
from megatron.config.neox import NeoXConfig
from megatron.config.training import TrainingConfig

MODEL = {"num_layers": 4, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 32, "max_position_embeddings": 32}


def config(**keys: Any) -> NeoXConfig:
    return config_from_dict({**MODEL, **keys})


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"fp16": True, "enabled": False}}, "fp32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"precision": "fp16", "fp16": {"enabled": True, "loss_scale": 0}}, "fp16"),
        ({"precision": "fp32", "fp16": {"enabled": False}}, "fp32"),
    ],
)
def test_precision(keys: dict[str, Any], precision: str) -> None:
    assert config(**keys).precision == precision


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 3072),
        ({"intermediate_size": 1000, "mlp_multiple_of": 256}, 1024),
        ({"activation": "swiglu"}, 1024),
        ({"activation": "swiglu", "intermediate_size": 86016}, 28672),  # Llama-3 70B as NeoX writes it: three times the width
        ({"activation": "swiglu", "intermediate_size": 14336}, 4779),  # mistral/7B.yml, where upstream's two projections disagree
        ({"activation": "swiglu", "intermediate_size": 11008, "mlp_multiple_of": 11008}, 11008),
        ({"activation": "glu", "ffn_hidden_size": 28672}, 28672),
        ({"ffn_hidden_size": 1000, "mlp_multiple_of": 8}, 1000),
        ({"expansion_factor": 2.667}, 2048),
        ({"expansion_factor": 8.0, "activation": "swiglu"}, 2048),
    ],
)
def test_dense_width_follows_neox(keys: dict[str, Any], width: int) -> None:
    assert config(**keys).model.mlp_width == width


@pytest.mark.parametrize(("keys", "width"), [({}, 3072), ({"hidden_size": 96, "num_attention_heads": 3}, 512), ({"intermediate_size": 1000}, 1000)])
def test_expert_width_follows_neox(keys: dict[str, Any], width: int) -> None:
    built = config(moe_num_experts=4, **keys)
    assert built.moe.expert_width(built.model) == width


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("keys", "width"), [({"ffn_hidden_size": 1000}, 1000), ({"expansion_factor": 0.5}, 384)])
def test_experts_take_the_plain_width(keys: dict[str, Any], width: int, activation: str) -> None:
    built = config(moe_num_experts=4, activation=activation, **keys)
    assert built.moe.expert_width(built.model) == width


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (None, ["global"] * 4),
        ([[["flash"], "all"]], ["flash"] * 4),
        ([[["global", "flash"], "all"]], ["global", "flash"] * 2),
        ([[["global"], 1], [["flash"], 3]], ["global", "flash", "flash", "flash"]),
        ([[["flash", "global"], 2]], ["flash", "global"] * 2),
        (["flash", "global", "global", "flash"], ["flash", "global", "global", "flash"]),
    ],
)
def test_attention_config_names_every_layer(value: list[Any] | None, layers: list[str]) -> None:
    assert config(attention_config=value).model.attention_types == layers


def test_which_layers_have_experts() -> None:
    def layers(**keys: Any) -> list[int]:
        return config(moe_num_experts=4, **keys).moe.moe_layer_numbers(4)

    assert layers() == [0, 1, 2, 3]
    assert layers(moe_expert_interval=2) == [0, 2]
    assert layers(moe_first_k_dense_layers=1) == [1, 2, 3]
    assert layers(moe_first_k_dense_layers=1, moe_expert_interval=2) == [1, 3]
    assert layers(moe_layers=[3, 1]) == [1, 3]
    assert config().moe.moe_layer_numbers(4) == []


def test_each_layer_has_its_own_number_of_experts() -> None:
    moe = config(moe_num_experts_by_layer=[4, 8], moe_layers=[1, 3]).moe
    assert {layer: section.num_experts for layer, section in moe.for_layers(4).items()} == {1: 4, 3: 8}


def test_fine_grained_experts_are_arithmetic() -> None:
    built = config(moe_num_experts=16, moe_top_k=2, moe_expert_segments=4, ffn_hidden_size=1024)
    assert (built.moe.num_experts, built.moe.top_k, built.moe.expert_width(built.model)) == (64, 8, 256)


# (train_batch_size, micro batch, accumulation), processes -> resolved; the cases of NeoX's triangle, which it only half solves.
@pytest.mark.parametrize(
    ("given", "processes", "batch"),
    [
        ((32, 4, None), 1, Batch(4, 8, 32)),
        ((32, 4, None), 2, Batch(4, 4, 32)),
        ((32, None, None), 4, Batch(8, 1, 32)),
        ((32, None, 2), 4, Batch(4, 2, 32)),
        ((None, 4, 8), 2, Batch(4, 8, 64)),
        ((None, 4, None), 2, Batch(4, 1, 8)),
        ((32, 4, 4), 2, Batch(4, 4, 32)),
    ],
)
def test_batch_triangle(given: tuple[int | None, ...], processes: int, batch: Batch) -> None:
    assert resolve_batch(_training(given), processes) == batch


@pytest.mark.parametrize(
    ("given", "processes", "problem"),
    [
        ((None, None, 4), 1, "'train_micro_batch_size_per_gpu' or 'train_batch_size' must be given (sequences per process, or per step in all)"),
        (
            (32, 4, 8),
            2,
            "'train_batch_size' = 32: must equal "
            "train_micro_batch_size_per_gpu (4) * gradient_accumulation_steps (8) * data-parallel processes (2)",
        ),
        ((32, 4, None), 3, "'train_batch_size' = 32: must be a multiple of train_micro_batch_size_per_gpu (4) * data-parallel processes (3)"),
        ((2, None, None), 4, "'train_batch_size' = 2: must be a multiple of data-parallel processes (4)"),
        ((4, 4, None), 2, "'train_batch_size' = 4: must be a multiple of train_micro_batch_size_per_gpu (4) * data-parallel processes (2)"),
    ],
)  # fmt: skip
def test_batch_triangle_that_does_not_multiply_out(given: tuple[int | None, ...], processes: int, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch(_training(given), processes)
    assert caught.value.problems == [problem]


def _training(given: tuple[int | None, ...]) -> TrainingConfig:
    return TrainingConfig(train_batch_size=given[0], train_micro_batch_size_per_gpu=given[1], gradient_accumulation_steps=given[2])


def test_length_of_the_schedule() -> None:
    assert config().lr_decay_iters is None
    assert config(train_iters=100).lr_decay_iters == 100
    assert config(train_iters=100, lr_decay_iters=80).lr_decay_iters == 80
    assert config(train_iters=100, lr_decay_fraction=0.5).lr_decay_iters == 50


def test_what_training_needs_is_asked_for_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        check_trainable(config(), 1)
    assert caught.value.problems == [
        "'train_iters' or 'train_epochs' must be given: the number of training steps, or the number of passes through the data",
        "'optimizer' must be given with its learning rate, such as {type: Adam, params: {lr: 6.0e-4}}",
        "'data_path' or 'train_data_paths' must be given: the tokens to train on",
        "'train_micro_batch_size_per_gpu' or 'train_batch_size' must be given (sequences per process, or per step in all)",
    ]
    for length in ("train_iters", "train_epochs"):
        check_trainable(config(**{length: 1}, optimizer={"params": {"lr": 1.0}}, data_path="x", train_batch_size=2), 2)
