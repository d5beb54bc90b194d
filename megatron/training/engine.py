"""The DeepSpeed engine around model and optimizer."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.machine import is_installed
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.model import GPT, choose_attention
from megatron.training.optimizer import Skipping, build_optimizer
from megatron.training.schedule import schedule_of
from megatron.training.schedule_record import ScheduleRecord

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


def check_packages(settings: DeepSpeedConfig) -> None:
    """Raises ConfigError for a package that one of DeepSpeed's monitors needs and that is not installed."""
    missing = [(package, key) for package, key in settings.needs_packages() if not is_installed(package)]
    if missing:
        raise ConfigError([f"{key} needs the package '{package}': pip install {package}, or leave the key out" for package, key in missing])


def build_engine(config: NeoXConfig, model: GPT, *, world_size: int) -> Any:
    """Model, optimizer and ZeRO stage as one engine: `engine(...)`, `engine.backward(loss)`, `engine.step()`. Runs on CPU and CUDA alike."""
    import deepspeed

    check_packages(config.deepspeed)
    if config.training.checkpoint_activations:
        model.enable_activation_checkpointing(config.training.checkpoint_num_layers)
    model.separate_documents(attention=config.data.reset_attention_mask, positions=config.data.reset_position_ids)
    optimizer = build_optimizer(config.optimizer, model, os.environ["DS_ACCELERATOR"])
    settings = deepspeed_config(config, world_size)
    if isinstance(optimizer, Skipping):
        settings["gradient_clipping"] = 0.0  # the optimizer clips while it steps
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    choose_attention(config.model, model)
    if world_size == 1 and isinstance(optimizer, Skipping):
        engine.enable_backward_allreduce = False  # a sum over one process: DeepSpeed would copy all gradients together and back for it
    engine.lr_scheduler = ScheduleRecord(schedule_of(config))
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # `max_nonfinite_steps` decides when a streak ends the run, with a sentence
    return engine
