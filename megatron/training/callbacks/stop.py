"""Ctrl-C, SIGTERM and `exit_interval`: finish the step, save, stop."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import TYPE_CHECKING

import torch

from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopCallback(Callback):
    """Turns a signal to any process into `trainer.stop_requested` on all of them, at the same step. A second Ctrl-C ends the process at once."""

    def __init__(self, exit_interval: int | None) -> None:
        self.exit_interval = exit_interval
        self._received: signal.Signals | None = None

    def before_training(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if (number := self._agreed(trainer)) is not None:
            trainer.stop_requested = f"{signal.Signals(number).name} received"
        elif self.exit_interval is not None and trainer.state.iteration % self.exit_interval == 0 and not trainer.finished:
            trainer.stop_requested = f"exit_interval: {self.exit_interval} reached"

    def after_training(self, trainer: Trainer) -> None:
        if trainer.stop_requested is not None and not trainer.finished:
            log.info("Stopped after step %d of %d: %s.", trainer.state.iteration, trainer.plan.train_iters, trainer.stop_requested)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            log.info("%s received: finishing the step, then saving and stopping.", signal.Signals(number).name)
        self._received = signal.Signals(number)

    def _agreed(self, trainer: Trainer) -> int | None:
        number = int(self._received or 0)
        if trainer.topology.world_size > 1:
            flag = torch.tensor([number], device=trainer.engine.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag.item())
        return number or None
