"""Warns of micro-batches in which no token counts in the loss."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class LabelsCallback(Callback):
    """Warns of the first step with micro-batches in which no token counts in the loss, and of their number at the end."""

    def __init__(self) -> None:
        self.micro_batches = self.without = self.empty_steps = 0

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if (labels := metrics.labels) is None:
            return
        if labels.without and not self.without:
            of_them = f"{labels.without} of its {labels.micro_batches} micro-batches"
            log.warning("Step %d: no token counts in the loss in %s. %s", trainer.state.iteration, of_them, consequence(trainer, metrics))
        self.micro_batches += labels.micro_batches
        self.without += labels.without
        self.empty_steps += metrics.is_empty

    def after_training(self, trainer: Trainer) -> None:
        if self.without:
            log.warning(
                "%s of %s micro-batches of this run had no token that counts in the loss; %s steps had none at all and changed nothing.",
                f"{self.without:,}",
                f"{self.micro_batches:,}",
                f"{self.empty_steps:,}",
            )


def consequence(trainer: Trainer, metrics: StepMetrics) -> str:
    """What such micro-batches do to the step."""
    if metrics.is_empty:
        return "There is nothing to learn from this step, so it changes nothing. A larger batch or a longer seq_length makes such steps rarer."
    if trainer.config.training.calculate_per_token_loss:
        return "They add nothing to the step's loss, which is the mean over the tokens that count in all its micro-batches."
    return "Each counts as a loss of 0 in the mean over micro-batches (calculate_per_token_loss: false)."
