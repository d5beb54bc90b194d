"""Saving: at the steps the configuration names, and at the end of the run however it ends well."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint import forward_check, layout
from megatron.checkpoint.engine import Contents
from megatron.checkpoint.retention import is_save_iteration, prune
from megatron.checkpoint.save import save_checkpoint
from megatron.config.checkpoint import CheckpointConfig
from megatron.training.callbacks.base import Callback
from megatron.training.evaluate import evaluation_logits

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
STATE = "training_state"
"""Key of the trainer's counters in a checkpoint's client state."""
DATA = "training_data"
"""Key of what the run reads (megatron.data.changed.data_facts) there."""


class CheckpointCallback(Callback):
    """`args`: NeoX's entries that a later load compares; `documents`: file name -> text for the checkpoint's configs/ folder;
    `layer_files`: the weights are written as a file for each layer.

    A save that fails raises CheckpointError and ends the run; the checkpoints that were there stay as they are.
    """

    def __init__(
        self, config: CheckpointConfig, directory: Path, *, args: Mapping[str, Any], documents: Mapping[str, str], layer_files: bool
    ) -> None:
        self.config = config
        self.directory = directory
        self.args = dict(args)
        self.documents = documents
        self.layer_files = layer_files
        self._saved: int | None = None

    def before_training(self, trainer: Trainer) -> None:
        if trainer.last_checkpoint is not None and trainer.last_checkpoint.parent.resolve() == self.directory.resolve():
            self._saved = trainer.state.iteration
        elif not trainer.state.iteration and 0 in (self.config.extra_save_iters or []):
            self._save(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        config = self.config
        if is_save_iteration(trainer.state.iteration, config.checkpoint_factor, config.checkpoint_scale, config.extra_save_iters):
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        if self._saved != trainer.state.iteration:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        iteration = trainer.state.iteration
        path = save_checkpoint(
            trainer.engine,
            self.directory,
            iteration,
            client_state={
                "args": self.args,
                STATE: trainer.state.state_dict(),
                DATA: trainer.data_facts,
                **self._origin(trainer),
                **self._logits(trainer),
            },
            documents=self.documents,
            contents=Contents(
                random_state=not self.config.no_save_rng,
                optimizer=not self.config.no_save_optim,
                layer_files=self.layer_files,
            ),
        )
        self._saved = iteration
        trainer.last_checkpoint = path
        if trainer.topology.is_first:
            prune(self.directory, self.config.keep_last_n_checkpoints)
        log.info("Saved %s in %.1f s.", path, time.perf_counter() - started)

    @staticmethod
    def _origin(trainer: Trainer) -> dict[str, Any]:
        """What an export asks for, to write an imported model as the class that it was."""
        return {} if trainer.origin is None else {layout.ORIGIN_KEY: trainer.origin}

    def _logits(self, trainer: Trainer) -> dict[str, Any]:
        """What a later load compares its own logits with, where that is wanted."""
        if not self.config.checkpoint_validation_with_forward_pass:
            return {}
        positions, vocabulary = min(forward_check.POSITIONS, trainer.plan.seq_length), self.args["padded_vocab_size"]
        logits = forward_check.validation_logits(partial(evaluation_logits, trainer.engine), positions=positions, vocabulary=vocabulary)
        return {forward_check.KEY: logits}
