"""Saves checkpoints at the steps that the configuration names, and at the end of a run that did not fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.checkpoint import forward_check, layout, ranks
from megatron.checkpoint.engine import Contents
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.finite import not_finite
from megatron.checkpoint.retention import is_save_iteration, prune, set_aside
from megatron.checkpoint.save import save_checkpoint
from megatron.config.checkpoint import CheckpointConfig
from megatron.data.folders import remove_folder
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
    """`args`: NeoX's entries that a later load compares. `documents`: file name -> text for the checkpoint's configs/ folder.
    `layer_files`: the weights are written as one file for each layer.

    Only good weights become a checkpoint of <save>. Good means: the weights are finite, the model's output for a text of the training data is finite,
    the last step was not skipped, and the last evaluation gave a finite loss.
    Weights in doubt are saved in <save>/suspect, where a user can look for the cause, and `latest` stays as it is. The checkpoint that was due is
    written at the next step with good weights, and the one in <save>/suspect is deleted then. Weights that are not finite are not saved.
    A save that fails raises CheckpointError and ends the run. Earlier checkpoints stay as they are.
    """

    def __init__(
        self, config: CheckpointConfig, directory: Path, *, args: Mapping[str, Any], documents: Mapping[str, str], layer_files: bool
    ) -> None:
        self.config = config
        self.directory = directory
        self.args = dict(args)
        self.documents = documents
        self.contents = Contents(random_state=not config.no_save_rng, optimizer=not config.no_save_optim, layer_files=layer_files)
        self._saved: int | None = None
        self._overdue = False
        self._suspect = False
        """Whether this launch has written a checkpoint in <save>/suspect."""

    def before_training(self, trainer: Trainer) -> None:
        if trainer.last_checkpoint is not None and trainer.last_checkpoint.parent.resolve() == self.directory.resolve():
            self._saved = trainer.state.iteration
        elif not trainer.state.iteration and 0 in (self.config.extra_save_iters or []):
            self._save(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        config = self.config
        due = is_save_iteration(trainer.state.iteration, config.checkpoint_factor, config.checkpoint_scale, config.extra_save_iters)
        if due or (self._overdue and trainer.health.trouble is None):
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        if self._saved != trainer.state.iteration:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        iteration, started = trainer.state.iteration, time.perf_counter()
        name = not_finite(trainer.engine.module)
        self._saved, self._overdue = iteration, True
        if name is not None:
            trainer.health.weights = f"{name} holds numbers that are NaN or infinite"
            log.warning("Step %d is not saved: %s.", iteration, trainer.health.weights)
            return
        trainer.health.weights = self._output_trouble(trainer)
        trouble = trainer.health.trouble or trainer.health.weights
        if trouble is not None:
            self._save_in_doubt(trainer, trouble)
            return
        self._overdue = False
        if self._suspect and trainer.topology.is_first:
            remove_folder(self.directory / layout.SUSPECT)  # it turned out to be no more than a hiccup, and the disk may be small
        self._suspect = False
        trainer.last_checkpoint = path = self._write(trainer, self.directory)
        trainer.health.saved()
        if trainer.topology.is_first and not trainer.finished:  # the last evaluation is to come: KeepGoodCallback
            prune(self.directory, self.config.keep_last_n_checkpoints)
        log.info("Saved %s in %.1f s.", path, time.perf_counter() - started)

    def _save_in_doubt(self, trainer: Trainer, trouble: str) -> None:
        """Failing to do that is no reason to end the run."""
        try:
            path = self._write(trainer, self.directory / layout.SUSPECT)
        except CheckpointError as error:
            log.warning("Step %d is in doubt: %s. %s", trainer.state.iteration, trouble, error)
            return
        if trainer.topology.is_first:
            prune(path.parent, 1)
        self._suspect = True
        log.warning("Step %d is saved as %s and does not become the latest checkpoint: %s.", trainer.state.iteration, path, trouble)

    def _write(self, trainer: Trainer, directory: Path) -> Path:
        return save_checkpoint(
            trainer.engine,
            directory,
            trainer.state.iteration,
            client_state={
                "args": self.args,
                STATE: trainer.state.state_dict(),
                DATA: trainer.data_facts,
                **self._origin(trainer),
                **self._logits(trainer),
            },
            documents=self.documents,
            contents=replace(self.contents, facts={layout.LOSSES_FINITE: trainer.health.losses_finite}, share=trainer.share),
        )

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

    def _output_trouble(self, trainer: Trainer) -> str | None:
        """Whether the model still computes numbers: finite weights may be so large that it does not. Collective."""
        text = trainer.datasets.train
        if text is None:
            return None
        place = (trainer.state.consumed_samples + trainer.topology.data_parallel_rank) % len(text)
        positions = min(forward_check.POSITIONS, trainer.plan.seq_length)
        tokens_BS = torch.as_tensor(text[place]["text"][:positions])[None].long()
        finite = bool(torch.isfinite(evaluation_logits(trainer.engine, tokens_BS)).all())
        return None if all(ranks.gather(finite)) else "the model's output for a text of the training data is NaN or infinite"


class KeepGoodCallback(Callback):
    """Acts after the last evaluation. If it gave NaN or infinity, the checkpoint of this step is moved to <save>/suspect. Then old checkpoints are
    deleted."""

    def __init__(self, config: CheckpointConfig, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self._loaded: Path | None = None

    def before_training(self, trainer: Trainer) -> None:
        self._loaded = trainer.last_checkpoint

    def after_training(self, trainer: Trainer) -> None:
        path, trouble = trainer.last_checkpoint, trainer.health.evaluation
        if trouble is not None and path is not None and path != self._loaded and path == self.directory / layout.tag(trainer.state.iteration):
            left = ranks.together(lambda: set_aside(self.directory, trainer.state.iteration), only_rank=0)
            trainer.last_checkpoint = ranks.gather(left)[0]
            log.warning("%s is moved to %s: %s.", path, self.directory / layout.SUSPECT, trouble)
        if trainer.topology.is_first:
            prune(self.directory, self.config.keep_last_n_checkpoints)
