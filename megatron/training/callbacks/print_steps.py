"""DeepSpeed's short progress line, every `steps_per_print` steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron.monitor.log_line import progress_line
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class PrintStepsCallback(Callback):
    """Prints the line of DeepSpeed's pipeline engine: the loss of the last step, and the mean time of the steps since the last line."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._seconds: list[float] = []

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._seconds.append(metrics.seconds)
        if trainer.state.iteration % self.interval:
            return
        seconds = sum(self._seconds) / len(self._seconds)
        if metrics.is_empty:
            return
        losses = {"loss": metrics.lm_loss, **dict(zip(trainer.config.moe.moe_losses, metrics.aux_losses, strict=True))}
        samples = trainer.plan.batch.global_ / seconds
        log.info("%s", progress_line(trainer.state.iteration, losses, seconds_per_step=seconds, samples_per_second=samples))
        self._seconds.clear()
