"""The moments at which a callback may act."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer


class Callback:
    """Override the methods you need. Every process calls the callbacks in the same order (in reverse order at the end), so collectives are
    allowed."""

    def before_training(self, trainer: Trainer) -> None:
        """Once, before the first step of this launch."""

    def before_update(self, trainer: Trainer) -> None:
        """In each step, when its gradients are complete and the weights are not yet changed; `trainer.state.iteration` does not count it yet."""

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """After each step; `trainer.state.iteration` already counts it."""

    def after_training(self, trainer: Trainer) -> None:
        """Once, after the last step, also if the run was asked to stop. It is not called after a failure."""

    def close(self) -> None:
        """Once, also after a failure: close everything that is open. Collectives are not allowed here, because another process may have failed."""
