"""Validation every `eval_interval` steps, validation and test at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.config.training import TrainingConfig
from megatron.data.loader import TextDataset
from megatron.monitor.log_line import evaluation_lines
from megatron.monitor.sink import Sink
from megatron.training.callbacks.base import Callback
from megatron.training.evaluate import evaluate

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
MAX_EXPONENT = 700.0


class EvaluateCallback(Callback):
    """The n-th evaluation reads the n-th `eval_iters` batches of the validation data, whether or not the run was resumed in between.

    A batch is as large as one of a training step, in as many micro-batches (`accumulation`), as in NeoX.
    """

    def __init__(self, config: TrainingConfig, accumulation: int, sinks: Sequence[Sink]) -> None:
        self.interval = config.eval_interval
        self.num_batches = config.eval_iters * accumulation
        self.sinks = sinks

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.state.iteration % self.interval == 0 and not trainer.finished:
            title = f"validation results at iteration {trainer.state.iteration}"
            self._evaluate(trainer, trainer.datasets.valid, "validation", title, turn=trainer.state.iteration // self.interval - 1)

    def after_training(self, trainer: Trainer) -> None:
        if trainer.finished:
            turn = trainer.state.iteration // self.interval
            self._evaluate(trainer, trainer.datasets.valid, "validation", "validation results at the end of training for val data", turn=turn)
            self._evaluate(trainer, trainer.datasets.test, "test", "test results at the end of training for test data", turn=0)

    def _evaluate(self, trainer: Trainer, dataset: TextDataset | None, name: str, title: str, *, turn: int) -> None:
        if dataset is None or not self.num_batches:
            return
        loss = evaluate(
            trainer.engine,
            dataset,
            trainer.topology,
            first_batch=turn * self.num_batches,
            num_batches=self.num_batches,
            masked_token=trainer.plan.masked_token,
        )
        trainer.health.after_evaluation(name, loss, iteration=trainer.state.iteration)
        perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
        for line in evaluation_lines(title, loss, perplexity).splitlines():
            log.info("%s", line)
        for sink in self.sinks:
            sink.write(trainer.state.iteration, {f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity})
