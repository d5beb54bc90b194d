"""Counts steps that were skipped. Too many in a row end the run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron.training.callbacks.base import Callback
from megatron.training.health import TrainingDiverged, way_back

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class WatchdogCallback(Callback):
    """Warns of each skipped step. Raises TrainingDiverged after `limit` in a row. Nothing is saved then, so the last checkpoint stays good."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.applied or metrics.is_empty:
            return
        state = trainer.state
        log.warning(
            "Step %d skipped: loss %s, gradient norm %s (%d in a row).", state.iteration, metrics.lm_loss, metrics.grad_norm, state.skipped_in_a_row
        )
        if state.skipped_in_a_row >= self.limit:
            raise TrainingDiverged(
                f"The loss or its gradients were NaN or infinite for {state.skipped_in_a_row} steps in a row (max_nonfinite_steps: {self.limit}), "
                f"up to step {state.iteration}. {way_back(trainer.last_checkpoint)} Try a lower lr, a longer warmup or a smaller gradient_clipping."
            )
