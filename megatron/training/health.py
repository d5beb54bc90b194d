"""Judges the weights of a run by its losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics


class TrainingDiverged(RuntimeError):
    """The loss or the gradients were NaN or infinite for too many steps in a row, or at the end; the message says what to go back to."""


@dataclass
class Health:
    """Kept by the trainer, the same on every process."""

    skipped: str | None = None
    """Why the last step changed nothing. None: it changed the weights, or fp16 is only searching for its loss scale."""
    evaluation: str | None = None
    """Which of the last evaluations gave NaN or infinity. None: no evaluation did."""
    weights: str | None = None
    """What was wrong with the weights at the last attempt to save them. None: nothing."""
    losses_finite: bool = True
    """Whether every training step and evaluation since the last checkpoint had a finite loss."""
    evaluated_at: int = -1
    """The step of the evaluation in `evaluation`."""

    @property
    def trouble(self) -> str | None:
        """Why the current weights are in doubt. None: they are not in doubt."""
        return self.skipped or self.evaluation

    def after_step(self, metrics: StepMetrics, *, iteration: int, in_a_row: int) -> None:
        """Records a training step. `in_a_row`: the number of skipped steps in a row up to this one."""
        finite = math.isfinite(metrics.lm_loss)
        self.losses_finite &= finite
        searching = finite and metrics.loss_scale is not None
        self.skipped = None
        if not metrics.applied and not searching:
            steps = f"step {iteration} changed" if in_a_row == 1 else f"the {in_a_row} steps up to {iteration} changed"
            what = f"loss is {metrics.lm_loss}" if not finite else f"gradient norm is {metrics.grad_norm}"
            self.skipped = f"{steps} nothing, because the {what}"

    def after_evaluation(self, name: str, loss: float, *, iteration: int) -> None:
        """Records a loss on held-out data. `name`: validation or test. A finite loss at a later step clears a bad one."""
        if not math.isfinite(loss):
            self.losses_finite, self.evaluated_at = False, iteration
            self.evaluation = f"the {name} loss at step {iteration} is {loss}"
        elif iteration > self.evaluated_at:
            self.evaluation = None

    def saved(self) -> None:
        """A good checkpoint was written."""
        self.losses_finite, self.weights = True, None


def way_back(last_checkpoint: object | None) -> str:
    """A sentence that says which checkpoint to go back to. `last_checkpoint` None: there is none."""
    if last_checkpoint is None:
        return "There is no checkpoint to go back to."
    return f"The last good checkpoint is {last_checkpoint}."
