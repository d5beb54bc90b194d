"""Checks whether a model fits into the memory, before it is allocated. The need is computed from the configuration and compared with the machine."""

from __future__ import annotations

import logging
import os

import torch

from megatron.config.memory import Room, check_fits, machine_memory
from megatron.config.neox import NeoXConfig
from megatron.config.size import Memory, count_parameters, divided_memory, training_memory

log = logging.getLogger(__name__)
BYTES = {"fp32": 4, "fp16": 2, "bfloat16": 2}


def check_training_fits(config: NeoXConfig, vocabulary: int, *, world_size: int) -> None:
    """Raises NotEnoughMemory if the weights and optimizer of the processes on this machine need more memory than it has. Warns if they need more
    than is free. `world_size`: data-parallel processes.

    Gradients and activations are not counted, so a model that passes may still be too large.
    """
    count, layout = count_parameters(config.model, config.moe, vocabulary), config.parallel.layout
    parameters, stage = count.total_sum, config.optimizer.zero_optimization.stage

    def memory_of(parameters: int, replicas: int) -> Memory:
        return training_memory(parameters, config.precision, zero_stage=stage, data_parallel_size=replicas, averages=config.optimizer.averages)

    memory = divided_memory(count, layout, world_size, memory_of)
    offloaded = {"offload_optimizer": memory.optimizer, "offload_param": memory.weights}
    device = torch.device(os.environ.get("DS_ACCELERATOR", "cpu"))
    moved = 0 if device.type == "cpu" else sum(size for key, size in offloaded.items() if key in config.optimizer.offloaded)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    processes = here if device.type != "cuda" else -(-here // max(1, torch.cuda.device_count()))
    what = f"Training {parameters:,} parameters in {config.precision} with ZeRO stage {stage}"
    advice = "Use a smaller model, bfloat16 in place of fp32, or a higher zero_optimization.stage on more machines; `deepy.py --check` says more."
    _check((memory.weights + memory.optimizer - moved) * processes, what=f"{what} ({processes} process(es) here)", advice=advice, device=device)
    if moved:
        _check(moved * here, what=f"{what}, offloaded to the CPU ({here} process(es) here)", advice=advice, device=torch.device("cpu"))


def check_model_fits(config: NeoXConfig, vocabulary: int, device: torch.device) -> None:
    """As `check_training_fits`, for a model that is not trained."""
    parameters = count_parameters(config.model, config.moe, vocabulary).total_sum
    what = f"A model of {parameters:,} parameters in {config.precision}"
    advice = "Use a machine with more memory, or precision: bfloat16 in place of fp32."
    _check(BYTES[config.precision] * parameters, what=what, advice=advice, device=device)


def check_comparison_fits(config: NeoXConfig, vocabulary: int) -> None:
    """As `check_training_fits`, for the comparison of logits at the end of a conversion: one model in float32 at a time, on the CPU."""
    parameters = count_parameters(config.model, config.moe, vocabulary).total_sum
    what = f"The comparison of the logits of {parameters:,} parameters in float32"
    _check(4 * parameters, what=what, advice="Add --skip-check to convert without it.", device=torch.device("cpu"))


def _check(needed: int, *, what: str, advice: str, device: torch.device) -> None:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        warning = check_fits(needed, Room(total, free), what=what, where="this GPU", advice=advice)
    else:
        warning = check_fits(needed, machine_memory(), what=what, where="this machine", advice=advice)
    if warning is not None:
        log.warning("%s", warning)
