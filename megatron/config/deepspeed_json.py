"""NeoXConfig -> the dictionary that DeepSpeed is initialised with."""

from __future__ import annotations

from typing import Any

from megatron.config.neox import NeoXConfig
from megatron.config.training import resolve_batch
from megatron.config.zero import deepspeed_settings


def deepspeed_config(config: NeoXConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for `world_size` data-parallel processes; the same on CPU and CUDA. Pure.

    There is no optimizer section: the engine is given a torch optimizer, which `zero_allow_untested_optimizer` permits under ZeRO. It also updates
    what is offloaded to the CPU (`zero_force_ds_cpu_optimizer`): DeepSpeed's own CPU Adam is compiled at first use, and PyTorch's is as fast.
    A step with a NaN or infinite gradient is skipped in bfloat16 as it is in fp16 (`check_grad_overflow`; with fp32 gradients at stage 1 always).
    Raises ConfigError when the batch sizes do not multiply out.
    """
    batch = resolve_batch(config.training, world_size)
    optimizer, logging = config.optimizer, config.logging
    settings: dict[str, Any] = {
        "train_batch_size": batch.global_,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": deepspeed_settings(optimizer.zero_optimization.model_dump(mode="json")),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": logging.steps_per_print or None,
        "wall_clock_breakdown": logging.wall_clock_breakdown,
        "fp16": _fp16(config),
        "bf16": {"enabled": config.precision == "bfloat16", "check_grad_overflow": True},
    }
    if "offload_optimizer" in optimizer.offloaded:
        settings["zero_force_ds_cpu_optimizer"] = False
    alone = world_size == 1 and config.sums_in_fp32  # nothing is sent, but at stage 1 DeepSpeed rounds fp32 sums to the format of sending
    if optimizer.fp32_allreduce or (alone and config.precision != "fp32"):
        settings["communication_data_type"] = "fp32"
    if optimizer.data_types and not (optimizer.zero_optimization.stage == 0 and config.precision != "fp32"):  # our MasterWeights sums there
        settings["data_types"] = dict(optimizer.data_types)
    return settings | config.deepspeed.settings()


def _fp16(config: NeoXConfig) -> dict[str, Any]:
    if config.precision != "fp16":
        return {"enabled": False}
    given = config.optimizer.fp16.model_dump(mode="json", exclude_unset=True, exclude={"fp16", "type", "auto_cast"}) if config.optimizer.fp16 else {}
    return given | {"enabled": True}
