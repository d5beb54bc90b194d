"""Validation every `eval_interval` steps and at `extra_eval_iters`, validation and test at the end."""

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
from megatron.training.evaluate import evaluate, evaluates_after, evaluations_until

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
MAX_EXPONENT = 700.0


class EvaluateCallback(Callback):
    """The n-th evaluation reads the n-th group of `eval_iters` batches of the validation data, also in a resumed run.

    A batch is as large as the batch of a training step and has as many micro-batches (`accumulation`), as in NeoX.
    """

    def __init__(self, config: TrainingConfig, accumulation: int, sinks: Sequence[Sink]) -> None:
        self.config = config
        self.num_batches = config.eval_iters * accumulation
        self.sinks = sinks

    def before_training(self, trainer: Trainer) -> None:
        if not trainer.state.iteration and 0 in (self.config.extra_eval_iters or []):
            self._evaluate(trainer, trainer.datasets.valid, "validation", "validation results at iteration 0", turn=0)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        iteration = trainer.state.iteration
        if evaluates_after(self.config, iteration) and not trainer.finished:
            title = f"validation results at iteration {iteration}"
            self._evaluate(trainer, trainer.datasets.valid, "validation", title, turn=evaluations_until(self.config, iteration) - 1)

    def after_training(self, trainer: Trainer) -> None:
        if trainer.finished:
            turn = evaluations_until(self.config, trainer.state.iteration)
            self._evaluate(trainer, trainer.datasets.valid, "validation", "validation results at the end of training for val data", turn=turn)
            self._evaluate(trainer, trainer.datasets.test, "test", "test results at the end of training for test data", turn=0)

    def _evaluate(self, trainer: Trainer, dataset: TextDataset | None, name: str, title: str, *, turn: int) -> None:
        if dataset is None or not self.num_batches:
            return
        found = evaluate(
            trainer.engine,
            dataset,
            trainer.topology,
            span=range(turn * self.num_batches, (turn + 1) * self.num_batches),
            masked_token=trainer.plan.masked_token,
            per_token=self.config.calculate_per_token_loss,
        )
        if found.loss is None:
            log.warning(
                "%s: no token of the %d micro-batches counts in the loss, so there is no loss to report. Raise eval_iters.", title, self.num_batches
            )
            return
        trainer.health.after_evaluation(name, found.loss, iteration=trainer.state.iteration)
        losses = {name: (title, found.loss)} | {f"{name}/{corpus}": (f"{title} of {corpus}", loss) for corpus, loss in found.by_corpus.items()}
        values: dict[str, float] = {}
        for key, (heading, loss) in losses.items():
            perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
            for line in evaluation_lines(heading, loss, perplexity).splitlines():
                log.info("%s", line)
            values |= {f"{key}/lm_loss": loss, f"{key}/lm_loss_ppl": perplexity}
        for sink in self.sinks:
            sink.write(trainer.state.iteration, values)
