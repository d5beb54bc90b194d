"""Ctrl-C, SIGTERM, `exit_interval` and a file that cannot be written: finish the step, save, stop."""

from __future__ import annotations

import logging
import os
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
CANNOT_WRITE = 1000
"""The processes exchange this number, in place of a signal's number, if one of them could not write a file."""
FAILURE = 1
"""Exit status after a failure to write."""


class StopCallback(Callback):
    """Sets `trainer.stop_requested` on all processes at the same step, if one process got a signal or could not write a file.

    A second Ctrl-C ends the process at once. If the process was started with a signal ignored (`nohup`, `&` in a script), it stays ignored.

    This callback is the last one after each step, so that no slow work comes between its look at the signals and the next step.
    """

    def __init__(self, exit_interval: int | None) -> None:
        self.exit_interval = exit_interval
        self._received: signal.Signals | None = None
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}

    def before_training(self, trainer: Trainer) -> None:
        self._look(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._look(trainer)
        if self.exit_interval is not None and trainer.state.iteration % self.exit_interval == 0 and trainer.stop_requested is None:
            trainer.stop_requested = f"exit_interval: {self.exit_interval} reached"

    def after_training(self, trainer: Trainer) -> None:
        if trainer.stop_requested is not None and not trainer.finished:
            log.info("Stopping after step %d of %d: %s.", trainer.state.iteration, trainer.plan.train_iters, trainer.stop_requested)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:  # not through a stream: the signal may have come in the middle of writing to one
            os.write(2, f"\n{signal.Signals(number).name} received: the run finishes the current step, then saves and stops.\n".encode())
        self._received = signal.Signals(number)

    def _look(self, trainer: Trainer) -> None:
        number = int(self._received or 0) or (CANNOT_WRITE if trainer.failures else 0)
        if trainer.topology.world_size > 1:
            flag = torch.tensor([number], device=trainer.engine.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag.item())
        if number == CANNOT_WRITE:
            trainer.stop_requested, trainer.exit_status = "a file of the run cannot be written", FAILURE
        elif number:
            trainer.stop_requested, trainer.exit_status = f"{signal.Signals(number).name} received", 128 + number  # as shells have it
