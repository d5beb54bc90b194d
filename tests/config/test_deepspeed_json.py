"""The dictionary for DeepSpeed, checked against the DeepSpeed that is installed."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import config_from_dict
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.neox import check_device
from megatron.config.section import ConfigError
from megatron.config.zero import ZERO_KEYS, deepspeed_settings, zero_problems

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
NEOX_ZERO = {"stage": 1, "allgather_bucket_size": "5e8", "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False}

CASES: list[dict[str, Any]] = [
    {"train_micro_batch_size_per_gpu": 4},
    {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "zero_optimization": NEOX_ZERO, "bf16": {"enabled": True}},
    {"train_batch_size": 16, "precision": "fp16", "fp16": {"loss_scale": 0, "initial_scale_power": 12}, "zero_optimization": {"stage": 2}},
    {"train_batch_size": 16, "precision": "fp16", "gradient_clipping": 0, "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1000}},
    {"train_batch_size": 16, "zero_optimization": {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "none"}, "offload_param": None}},
    {"train_batch_size": 16, "precision": "bfloat16", "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    {"train_batch_size": 16, "fp16": {"min_loss_scale": 2.0}},
    {"train_batch_size": 16, "fp32_allreduce": True, "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 0, "wall_clock_breakdown": True},
]


@pytest.mark.parametrize("keys", CASES)
def test_deepspeed_accepts_it(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = deepspeed_config(config_from_dict({**MODEL, **keys}), 1)
    accepted = DeepSpeedConfig(settings)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert getattr(accepted, key) == settings[key]
    assert int(accepted.zero_config.stage) == settings["zero_optimization"]["stage"]
    assert accepted.bfloat16_config.enabled is settings["bf16"]["enabled"]
    assert accepted.float16_config.enabled is settings["fp16"]["enabled"]


def test_values() -> None:
    keys = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "zero_optimization": NEOX_ZERO, "fp32_allreduce": True}
    fp16 = {"enabled": True, "type": "fp16", "loss_scale_window": 500}
    assert deepspeed_config(config_from_dict({**MODEL, **keys, "fp16": fp16, "data_types": {"grad_accum_dtype": "fp32"}}), 2) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "allgather_bucket_size": 5e8, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": True, "loss_scale_window": 500},
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_our_list_of_zero_settings_is_deepspeed_s() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = set(DeepSpeedZeroConfig.model_fields) | {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    assert names - {"stage"} == ZERO_KEYS


VALUES: list[Any] = [
    True,
    False,
    None,
    0,
    1,
    -1,
    7,
    5e8,
    0.5,
    2.5,
    float("inf"),
    "big",
    "",
    [],
    ["x"],
    {},
    {"device": "cpu"},
    {"names": ["x"]},
    {"names": 1},
]


@pytest.mark.parametrize("key", sorted(ZERO_KEYS))
def test_what_deepspeed_refuses_is_refused_before(key: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    accepted = [value for value in VALUES if not list(zero_problems({key: value}))]
    assert accepted
    for value in accepted:
        DeepSpeedZeroConfig(**deepspeed_settings({"stage": 1, key: value}))


def accepted_by_deepspeed(key: str) -> list[Any]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {bool: [True, False], int: [1, 7, 5e8]}
    field = next(field for name, field in DeepSpeedZeroConfig.model_fields.items() if key in (name, field.alias))
    return next((values for kind, values in kinds.items() if field.annotation in (kind, kind | None)), [None])


@pytest.mark.parametrize("key", sorted(ZERO_KEYS))
def test_good_values_are_not_refused(key: str) -> None:
    refused = [value for value in accepted_by_deepspeed(key) if list(zero_problems({key: value}))]
    on_purpose = {"compute_grad_norm": [False], "legacy_stage1": [True]}.get(key, [True] if key.startswith("cpu_offload") else [])
    assert refused == on_purpose


def test_without_a_gpu_fp16_is_refused() -> None:
    for keys, name in ({"precision": "fp16"}, "precision"), ({"fp16": {"enabled": True}}, "fp16.enabled"):
        config = config_from_dict({**MODEL, **keys})
        check_device(config, "cuda")
        with pytest.raises(ConfigError) as caught:
            check_device(config, "cpu")
        assert caught.value.problems == [f"'{name}' asks for fp16: training in it needs a GPU; on a CPU use precision fp32 or bfloat16"]
    for precision in ("fp32", "bfloat16"):
        check_device(config_from_dict({**MODEL, "precision": precision}), "cpu")
