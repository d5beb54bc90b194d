"""Measures the gradient noise scale while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron.config.logging import LoggingConfig
from megatron.monitor.sink import Sink
from megatron.training.callbacks.base import Callback
from megatron.training.gradients import counted_gradients, over_stages
from megatron.training.noise_scale import NoiseScale

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer


class NoiseScaleCallback(Callback):
    """Writes `train/noise_scale` whenever there is a new value. The first replica keeps the sum of gradients, each of its pipeline stages its own
    part. A resumed run starts the measurement again."""

    def __init__(self, config: LoggingConfig, batch: int, sinks: Sequence[Sink]) -> None:
        device = torch.device("cpu") if config.gradient_noise_scale_cpu_offload else None
        self.scale = NoiseScale(batch=batch, n_batches=config.gradient_noise_scale_n_batches, device=device, total=_over_stages)
        self.sinks = sinks
        self._found: float | None = None

    def before_update(self, trainer: Trainer) -> None:
        gradients = counted_gradients(trainer.engine)
        if trainer.topology.data_parallel_rank == 0:
            self._found = self.scale.add(gradients)
        else:
            for _ in gradients:  # every process takes part in putting them together
                pass

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._found is not None:
            for sink in self.sinks:
                sink.write(trainer.state.iteration, {"train/noise_scale": self._found})
        self._found = None


def _over_stages(number: float) -> float:
    """The sum over the pipeline. Collective."""
    return over_stages({"sum": number}, added=True)["sum"]
