"""`eval_tasks` during training: the model of the run, on the processes of the run, in any layout.

Shapes: B rows; S positions; N texts, or chosen positions; V padded vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from megatron.data.progress import build_reporter
from megatron.data.tokenizer import build_tokenizer
from megatron.data.tokenizer.companions import folder_of
from megatron.data.tokenizer.eod import find_stop_tokens
from megatron.inference.harness.run import Model, check_installed, run_tasks, whole_window
from megatron.inference.harness.shown import tasks_scalars, tasks_table
from megatron.inference.harness.tasks import load_tasks
from megatron.inference.model import ReadyModel
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import TextState
from megatron.monitor.sink import Sink
from megatron.mpu.groups import Group, current_groups
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class EngineForward:
    """The model inside a DeepSpeed engine. Replicas share the rows, and each runs as many batches as the others: experts and weights may be divided
    between them, and then a forward needs all."""

    independent = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        region = engine.module.region
        self.multiple: int = region.group.size if region.sequence else 1
        self._divided = engine.zero_optimization_stage() == 3
        """Whether weights are put together by hooks of the engine, which the model's other methods do not have."""

    @property
    def replicas(self) -> Group:
        """See Forward."""
        return current_groups().data

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor, chosen_BS: Tensor) -> Tensor:
        """See Forward."""
        tokens_BS, chosen_BS = tokens_BS.to(self.engine.device), chosen_BS.to(self.engine.device)
        if self._divided:
            logits_NV: Tensor = self.engine(tokens_BS).logits_BSV[chosen_BS]
        else:
            logits_NV = self.engine.module.chosen_logits(tokens_BS, chosen_BS)
        return logits_NV

    @torch.no_grad()
    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """See Forward."""
        device = self.engine.device
        output = self.engine(tokens_BS.to(device), labels_BS=labels_BS.to(device))
        return current_groups().pipe.sum(output.token_loss_BS.float())


@dataclass
class ReadText(TextState):
    """A text without keys and values: its tokens."""

    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    @length.setter
    def length(self, length: int) -> None:
        del self.tokens[length:]


class WholeTextRunner:
    """Generates without a cache: the whole texts go through the model for every new token. Every process does the same. Slow, but right in every
    layout; most tasks generate nothing."""

    def __init__(self, forward: EngineForward, vocabulary: int) -> None:
        self._forward, self._vocabulary = forward, vocabulary

    def open(self, capacity: int) -> ReadText:
        """See Runner."""
        return ReadText([])

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner."""
        assert isinstance(state, ReadText)
        state.tokens += tokens
        return self._next([state])[0]

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner."""
        texts = [state for state in states if isinstance(state, ReadText)]
        for state, token in zip(texts, tokens, strict=True):
            state.tokens.append(token)
        return self._next(texts)

    def _next(self, states: Sequence[ReadText]) -> Tensor:
        """logits_NV after the last token of each text."""
        longest, multiple = max(state.length for state in states), self._forward.multiple
        tokens_BS = torch.zeros(len(states), -(-longest // multiple) * multiple, dtype=torch.int64)
        chosen_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        for state, tokens_S, chosen_S in zip(states, tokens_BS, chosen_BS, strict=True):
            tokens_S[: state.length] = torch.tensor(state.tokens)
            chosen_S[state.length - 1] = True
        return self._forward.logits(tokens_BS, chosen_BS)[:, : self._vocabulary].float()


class TasksCallback(Callback):
    """Measures `eval_tasks` every `eval_tasks_interval` steps and after the last one, and gives `eval/<task>_<metric>` to the sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._tasks: dict[str, Any] | None = None
        """The tasks with their data, loaded before the first step, so that a mistake costs no training."""

    def before_training(self, trainer: Trainer) -> None:
        check_installed()
        self._tasks = load_tasks(trainer.config.evaluation, shown=trainer.topology.is_first)
        names = self._tasks["tasks"]
        log.info("eval_tasks: %d task(s) of lm-evaluation-harness every %s steps.", len(names), trainer.config.evaluation.eval_tasks_interval)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        interval = trainer.config.evaluation.eval_tasks_interval
        if interval and trainer.state.iteration % interval == 0 and not trainer.finished:
            self._measure(trainer)

    def after_training(self, trainer: Trainer) -> None:
        if trainer.finished:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        assert self._tasks is not None
        config, engine, iteration = trainer.config, trainer.engine, trainer.state.iteration
        forward = EngineForward(engine)
        ready = whole_window(ready_of(trainer))
        for task in self._tasks["tasks"].values():
            task._instances = None  # it keeps the answers of the time before
        engine.eval()
        try:
            runner = WholeTextRunner(forward, ready.tokenizer.vocab_size)
            found = run_tasks(config, self._tasks, Model(ready, runner, forward), build_reporter(quiet=True))
        finally:
            engine.train()
        log.info("eval_tasks at iteration %d:", iteration)
        console = Console(width=120)
        with console.capture() as shown:
            console.print(tasks_table(found))
        for line in shown.get().splitlines():
            log.info("%s", line.rstrip())
        for sink in self._sinks:
            sink.write(iteration, tasks_scalars(found["results"]))


def ready_of(trainer: Trainer) -> ReadyModel:
    """The model of a run as one that is ready to be measured."""
    config, engine = trainer.config, trainer.engine
    tokenizer = build_tokenizer(config.data)
    stops = find_stop_tokens(tokenizer.token_to_id, folder_of(config.data), tokenizer.eod)
    place = Path(config.checkpoint.save or "the model in training")
    return ReadyModel(engine.module, tokenizer, config.model, torch.device(engine.device), place, trainer.state.iteration, stops)


def task_callbacks(trainer: Trainer, sinks: Sequence[Sink]) -> list[Callback]:
    """The callback, if the configuration asks for it."""
    return [TasksCallback(sinks)] if trainer.config.evaluation.eval_tasks_interval else []
