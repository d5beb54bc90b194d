"""DeepSpeed's table of collective operations, at the end of a run with `comms_logger`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.trainer import Trainer


class CommunicationCallback(Callback):
    """Prints how often, how much and how fast the processes communicated."""

    def after_training(self, trainer: Trainer) -> None:
        import deepspeed.comm

        deepspeed.comm.log_summary()
