"""Lets the coefficients of auxiliary losses rise during training (`moe_loss_ramp`).

A step is weighed by the part of the run that is done before it. So a resumed run goes on where it was, and nothing has to be saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.config.moe import MoEConfig
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer


class LossRampCallback(Callback):
    """Gives the model the coefficients of the next step."""

    def __init__(self, moe: MoEConfig) -> None:
        self.moe = moe

    def before_training(self, trainer: Trainer) -> None:
        self._weigh(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._weigh(trainer)

    def _weigh(self, trainer: Trainer) -> None:
        trainer.engine.module.weigh_losses(coefficients(self.moe, trainer.state.iteration / trainer.plan.train_iters))


def coefficients(moe: MoEConfig, done: float) -> list[float]:
    """The coefficient of each loss of `moe_losses`, in its order, when this part of the steps is done (0 to 1)."""
    return [coefficient * risen(moe.moe_loss_ramp.get(name), done) for name, coefficient in moe.moe_losses.items()]


def risen(ramp: list[float] | None, done: float) -> float:
    """The part of a coefficient that counts, 0 to 1. `ramp` None: all of it from the first step on."""
    if ramp is None or done >= ramp[1]:
        return 1.0
    return (done - ramp[0]) / (ramp[1] - ramp[0]) if done > ramp[0] else 0.0
