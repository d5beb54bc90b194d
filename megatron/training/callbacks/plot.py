"""A picture of the run when it ends."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.monitor.guarded import wrote
from megatron.monitor.plot import NothingToDraw, plot_metrics
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class PlotCallback(Callback):
    """Draws losses and expert load from the metrics file; the first process does it."""

    def __init__(self, metrics_file: Path, picture: Path) -> None:
        self.metrics_file = metrics_file
        self.picture = picture

    def after_training(self, trainer: Trainer) -> None:
        if not trainer.topology.is_first:
            return
        try:
            drawn = wrote(partial(plot_metrics, self.metrics_file, self.picture, title=str(self.metrics_file.parent)), self.picture, trainer.failures)
        except NothingToDraw as error:
            log.warning("No picture: %s.", error)
        else:
            if drawn:
                log.info("Picture of the run, step by step: %s (the numbers: %s)", self.picture, self.metrics_file)
