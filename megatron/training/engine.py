"""The DeepSpeed engine around model and optimizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.machine import is_installed
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.config.training import TrainingConfig
from megatron.model import GPT, choose_implementations
from megatron.model.divide import expert_group_name
from megatron.model.pipeline import Stage
from megatron.model.recompute import KeptInputs
from megatron.mpu.deepspeed import DeepSpeedMpu, tell_deepspeed
from megatron.mpu.gradients import marks_of, sum_shared_gradients
from megatron.mpu.groups import ALONE, Group, current_groups
from megatron.training.optimizer import build_optimizer
from megatron.training.process import return_freed_memory
from megatron.training.schedule import schedule_of
from megatron.training.schedule_record import ScheduleRecord
from megatron.training.skipping import Skipping


def check_packages(settings: DeepSpeedConfig) -> None:
    """Raises ConfigError for a package that one of DeepSpeed's monitors needs and that is not installed."""
    missing = [(package, key) for package, key in settings.needs_packages() if not is_installed(package)]
    if missing:
        raise ConfigError([f"{key} needs the package '{package}': pip install {package}, or leave the key out" for package, key in missing])


def enable_recomputation(training: TrainingConfig, model: GPT, *, equal: Group) -> None:
    """Sets what the model keeps for the backward pass. `equal`: the processes that hold the same hidden states."""
    if training.checkpoint_activations:
        on_cpu = training.keeps_inputs_on_cpu and os.environ["DS_ACCELERATOR"] != "cpu"
        kept = KeptInputs(group=equal if training.divides_kept_inputs else ALONE, on_cpu=on_cpu)
        model.enable_activation_checkpointing(training.checkpoint_num_layers, kept)
    model.recompute_modules(training.recompute_modules)


@contextmanager
def own_engines(*, sum_in_fp32: bool, divides_experts: bool) -> Iterator[None]:
    """Inside this context DeepSpeed uses our MasterWeights, and not its own wrapper, for 16-bit weights at stage 0; and our engine for a pipeline."""
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    from megatron.training.master_weights import MasterWeights
    from megatron.training.pipeline import StageEngine

    class Own:
        @property
        def has_moe_layers(self) -> bool:
            """Whether there are experts that other processes do not have. DeepSpeed looks for layers of its own class, and asks in every step."""
            return divides_experts

        @has_moe_layers.setter
        def has_moe_layers(self, found: bool) -> None:
            assert not found

        has_stepped = False

        def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
            super()._take_model_step(lr_kwargs)  # type: ignore[misc]  # DeepSpeed's, which follows in the class that is made below
            if not self.has_stepped:
                return_freed_memory()  # the optimizer's state is there now, the gradients are gone
                self.has_stepped = True

        def _configure_fp16_optimizer(self: Any, optimizer: Skipping, low_precision_dtype: torch.dtype) -> MasterWeights:
            arguments = self.loss_scale(), self.dynamic_loss_scale(), self.dynamic_loss_scale_args()
            return MasterWeights(optimizer, scaler=CreateLossScaler(low_precision_dtype, *arguments), sum_in_fp32=sum_in_fp32)

    theirs = deepspeed.DeepSpeedEngine, deepspeed.PipelineEngine
    deepspeed.DeepSpeedEngine = type("Engine", (Own, theirs[0]), {})
    deepspeed.PipelineEngine = type("PipeEngine", (Own, StageEngine), {})
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine, deepspeed.PipelineEngine = theirs


@contextmanager
def without_triton() -> Iterator[None]:
    """Inside this context DeepSpeed finds no Triton if there is no GPU. It would load it, 70 MiB, and not use it (0.19.8: `ops/triton_ops`)."""
    hidden = os.environ["DS_ACCELERATOR"] == "cpu" and "triton" not in sys.modules
    if hidden:
        sys.modules["triton"] = None  # type: ignore[assignment]  # Python's way to say that a module cannot be imported
    try:
        yield
    finally:
        if hidden:
            del sys.modules["triton"]


def build_engine(config: NeoXConfig, model: GPT, *, world_size: int) -> Any:
    """Model, optimizer and ZeRO stage as one engine: `engine(...)`, `engine.backward(loss)`, `engine.step()`. It runs on CPU and CUDA.

    For a stage of a pipeline it is a `StageEngine`. `world_size`: data-parallel processes.
    """
    import deepspeed

    from megatron.training.pipeline import StageModule

    groups = current_groups()
    if groups.expert.size > 1:
        tell_deepspeed(groups, expert_group_name(groups.expert))
    check_packages(config.deepspeed)
    enable_recomputation(config.training, model, equal=ALONE if config.parallel.sequence_parallel else groups.tensor)
    model.separate_documents(attention=config.data.reset_attention_mask, positions=config.data.reset_position_ids)
    optimizer = build_optimizer(config.optimizer, model, os.environ["DS_ACCELERATOR"])
    settings = deepspeed_config(config, world_size)
    if isinstance(optimizer, Skipping):
        settings["gradient_clipping"] = 0.0  # the optimizer clips while it steps
    divides_experts = any(not marks_of(parameter).allreduce for parameter in model.parameters())
    with own_engines(sum_in_fp32=config.sums_in_fp32, divides_experts=divides_experts), without_triton():
        mpu = DeepSpeedMpu(groups) if groups.model.size > 1 and groups.pipe.size == 1 else None  # a pipeline module brings it along
        module = StageModule(model) if isinstance(model, Stage) else model
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False)
    sum_shared_gradients(engine.module, groups.tensor)
    choose_implementations(config.model, config.moe, model)
    if world_size == 1 and isinstance(optimizer, Skipping):
        # a sum over one process: DeepSpeed would copy all gradients together and back for it
        engine.enable_backward_allreduce = engine.pipeline_enable_backward_allreduce = False
    engine.lr_scheduler = ScheduleRecord(schedule_of(config))
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # `max_nonfinite_steps` decides when a streak ends the run, with a sentence
    return engine
