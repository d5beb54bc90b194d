"""Lets the number of experts per token grow during training (router `smoe_dropout`).

It depends on the part of the steps that is done before a step. So a resumed run goes on where it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer


class GrowthCallback(Callback):
    """Tells the model how far the training is, before its first step and after every step."""

    def before_training(self, trainer: Trainer) -> None:
        self._grow(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._grow(trainer)

    def _grow(self, trainer: Trainer) -> None:
        trainer.engine.module.grow(trainer.state.iteration / trainer.plan.train_iters)
