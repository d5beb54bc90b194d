"""The dictionary for DeepSpeed, checked against the DeepSpeed that is installed."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import config_from_dict
from megatron.config.deepspeed import NEOX_KEYS, NOT_CONNECTED, PASSED_ON
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.neox import check_device
from megatron.config.offload import SETTINGS as OFFLOAD_SETTINGS
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

    accepted = [value for value in VALUES if not list(zero_problems({key: value}, 3))]
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
    refused = [value for value in accepted_by_deepspeed(key) if list(zero_problems({key: value}, 3))]
    on_purpose = {"compute_grad_norm": [False], "legacy_stage1": [True]}.get(key, [])
    assert refused == on_purpose


def test_the_settings_of_offloading_are_deepspeed_s() -> None:
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    theirs = {"offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig, "offload_param": DeepSpeedZeroOffloadParamConfig}
    assert {key: set(names) for key, names in OFFLOAD_SETTINGS.items()} == {key: set(kind.model_fields) for key, kind in theirs.items()}


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"stage": 2, "cpu_offload": True}, {"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        ({"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True}, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
        ({"stage": 3, "cpu_offload_param": True}, {"offload_param": {"device": "cpu", "pin_memory": False}}),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "nvme_path": None}}, {"offload_optimizer": {"device": "cpu"}}),
        ({"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "none"}, "offload_param": None}, {}),
    ],
)
def test_deepspeed_is_told_to_offload_to_the_cpu(settings: dict[str, Any], given: dict[str, Any]) -> None:
    found = deepspeed_config(config_from_dict({**MODEL, "train_batch_size": 1, "zero_optimization": settings}), 1)
    assert {key: value for key, value in found["zero_optimization"].items() if "offload" in key} == given
    assert found.get("zero_force_ds_cpu_optimizer") == (False if "offload_optimizer" in given else None)


def test_without_a_gpu_fp16_is_refused() -> None:
    by_name = ({"precision": "fp16"}, "precision", "precision=fp32 or precision=bfloat16")
    for keys, name, instead in by_name, ({"fp16": {"enabled": True}}, "fp16.enabled", "fp16.enabled=false"):
        config = config_from_dict({**MODEL, **keys})
        check_device(config, "cuda")
        with pytest.raises(ConfigError) as caught:
            check_device(config, "cpu")
        assert caught.value.problems == [f"'{name}' asks for fp16, but training in fp16 needs a GPU; on a CPU add -o {instead}"]
    for precision in ("fp32", "bfloat16"):
        check_device(config_from_dict({**MODEL, "precision": precision}), "cpu")


PASSED: dict[str, Any] = {
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "communication_data_type": "fp16",
    "dump_state": True,
    "flops_profiler": {"enabled": True, "profile_step": 3},
    "comms_logger": {"enabled": True, "verbose": True},
    "csv_monitor": {"enabled": True, "output_path": "logs"},
    "tensorboard": {"enabled": False, "job_name": "x"},
    "wandb": {"enabled": False, "project": "p"},
}
EXTRA = {"memory_breakdown": True, "timers": {"throughput": {"enabled": False}}, "disable_python_gc": True, "comet": {"enabled": False}}


@pytest.mark.parametrize("key", PASSED)
def test_a_passed_key_reaches_deepspeed_also_from_the_extra_arguments(key: str) -> None:
    for keys in ({key: PASSED[key]}, {"deepspeed_extra_args": {key: PASSED[key]}}):
        assert deepspeed_config(config_from_dict({**MODEL, "train_batch_size": 1, **keys}), 1)[key] == PASSED[key]
    assert key not in deepspeed_config(config_from_dict({**MODEL, "train_batch_size": 1}), 1)


def test_deepspeed_understands_what_is_passed() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    accepted = DeepSpeedConfig(deepspeed_config(config_from_dict({**MODEL, "train_batch_size": 1, **PASSED, "deepspeed_extra_args": EXTRA}), 1))
    assert (accepted.prescale_gradients, accepted.gradient_predivide_factor) == (True, 2.0)
    assert str(accepted.communication_data_type) == "torch.float16"
    assert (accepted.dump_state, accepted.memory_breakdown, accepted.disable_python_gc) == (True, True, True)
    assert (accepted.flops_profiler_config.enabled, accepted.flops_profiler_config.profile_step) == (True, 3)
    assert accepted.comms_config.comms_logger.verbose is True
    assert accepted.monitor_config.csv_monitor.output_path == "logs"
    assert accepted.timers_config.enabled is False
    assert accepted.log_level == "info", "what was asked for is told at this level"


def test_switched_off_is_not_mentioned() -> None:
    """DeepSpeed times its communication as soon as the dictionary is there."""
    assert "comms_logger" not in deepspeed_config(config_from_dict({**MODEL, "train_batch_size": 1, "comms_logger": {"enabled": False}}), 1)


def test_every_setting_of_deepspeed_s_is_known() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

        def __copy__(self) -> Recorder:
            return Recorder(self)

    DeepSpeedConfig(Recorder(train_batch_size=1))
    # Asked for only if an earlier test left this process connected to others: Hugging Face's way to Ulysses, without an mpu.
    asked.discard("sequence_parallel_size")
    known = NEOX_KEYS | NOT_CONNECTED | set(PASSED_ON)
    assert asked - known == {"bfloat16"}, "its old name for bf16, which is suggested"
    assert known - asked == {"fp32_allreduce"}, "NeoX's own"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"zero_optimization": {"stage": 1}, "prescale_gradients": True},
            "'prescale_gradients' = true: needs zero_optimization.reduce_scatter: false from ZeRO stage 1 on (stage is 1)",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_scatter": True}, "gradient_predivide_factor": 2.0},
            "'gradient_predivide_factor' = 2.0: needs zero_optimization.reduce_scatter: false from ZeRO stage 1 on (stage is 3)",
        ),
        (
            {"fp32_allreduce": True, "communication_data_type": "bf16"},
            "'communication_data_type' = 'bf16': contradicts fp32_allreduce: true; remove one of the two",
        ),
        ({"communication_data_type": True}, "'communication_data_type' = true: must be 'fp32', 'fp16' or 'bf16'"),
        (
            {"use_wandb": True, "wandb": {"enabled": True}},
            "'wandb.enabled' = true: cannot be combined with use_wandb: true, because one process can write only one run; keep use_wandb",
        ),
        (
            {"deepspeed_extra_args": {"timres": {}}},
            "'deepspeed_extra_args.timres' = {}: DeepSpeed has no such setting; did you mean 'timers'?; "
            "passed on: comet, disable_python_gc, log_level, memory_breakdown, timers",
        ),
        ({"deepspeed_extra_args": {"bfloat16": {}}}, None),
        (
            {"deepspeed_extra_args": {"torch_autocast": {"enabled": True}}},
            "'deepspeed_extra_args.torch_autocast' = {'enabled': True}: this version does not pass this setting on to DeepSpeed; remove it",
        ),
        ({"deepspeed_extra_args": {"memory_breakdown": "yes"}}, "'deepspeed_extra_args.memory_breakdown' = 'yes': must be true or false"),
        (
            {"deepspeed_extra_args": {"amp": {"enabled": True}}},
            "'amp' = {'enabled': True} is not supported: DeepSpeed has removed it; write precision: bfloat16 or precision: fp16",
        ),
    ],
)
def test_what_contradicts_is_a_sentence(keys: dict[str, Any], problem: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MODEL, **keys})
    if problem is None:
        assert "did you mean 'bf16'?" in caught.value.problems[0]
    else:
        assert caught.value.problems == [problem]


def test_without_reduce_scatter_gradients_may_be_scaled_first() -> None:
    for stage in (1, 2, 3):
        config_from_dict({**MODEL, "zero_optimization": {"stage": stage, "reduce_scatter": False}, "prescale_gradients": True})
