"""Decides where a run starts: from new weights, from the weights of a checkpoint, or from a whole checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron.checkpoint import forward_check, layout
from megatron.checkpoint.agreement import batch_change, check_architecture, length_change, samples_at_once, without_free_positions
from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.checkpoint.find import find_checkpoint_together
from megatron.checkpoint.load import load_checkpoint
from megatron.checkpoint.weights import read_config
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.data.changed import changed_keys, changes
from megatron.kernels.precision import DTYPES
from megatron.training.callbacks.checkpoint import DATA, STATE
from megatron.training.evaluate import evaluation_logits
from megatron.training.schedule_record import schedule_to_follow
from megatron.training.state import TrainingState
from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
SAME_STATE = {"AdamW": "Adam"}


class Start(NamedTuple):
    """A directory to load from, and whether the run goes on from that checkpoint. If not, only the weights are loaded."""

    directory: Path
    go_on: bool


def resume(trainer: Trainer) -> None:
    """Loads into `trainer` the start that the configuration names. Raises CheckpointError, or ConfigError if the checkpoint holds another model.
    A run never starts at step 0 without a message.
    """
    config = trainer.config.checkpoint
    start = choose_start(config)
    if start is None:
        log.info("Starting from new weights.")
        return
    path = find_start(start, config)
    for sentence in check_architecture(path, trainer.config.flat(), finetune=not start.go_on):
        log.info("%s", sentence)
    takes_optimizer = start.go_on and not config.no_load_optim
    if takes_optimizer:
        check_optimizer_type(path, trainer.config.optimizer)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in trainer.engine.optimizer.param_groups]
    client_state = load_checkpoint(
        trainer.engine,
        path,
        load_optimizer=takes_optimizer,
        load_rng=start.go_on and not config.no_load_rng,
        expected=replace(
            trainer.expected, args=without_free_positions(trainer.expected.args, trainer.config.model.pos_emb, finetune=not start.go_on)
        ),
        share=trainer.share,
    )
    trainer.origin = client_state.get(layout.ORIGIN_KEY)
    for group, own in zip(trainer.engine.optimizer.param_groups, settings, strict=True):
        group.update(own)  # this run's configuration decides on them, not the checkpoint
    if config.checkpoint_validation_with_forward_pass:
        log.info("%s", compare_logits(trainer, path, client_state.get(forward_check.KEY)))
    if not start.go_on:
        log.info("Starting at step 0 from the weights of %s.", path)
        return
    iteration = client_state.get("iteration")
    if iteration is None:
        raise CheckpointError(f"{path} does not say at which iteration it was saved: add `-o finetune=true` to start at step 0 from its weights.")
    # In GPT-NeoX's checkpoints, which are without our counters.
    upstreams = {"iteration": iteration, "skipped": trainer.engine.skipped_steps, "consumed_samples": iteration * trainer.plan.batch.global_}
    trainer.state = TrainingState.from_state_dict({**upstreams, **client_state.get(STATE, {})})
    trainer.state.samples_at_once = trainer.state.samples_at_once or samples_at_once(path)
    trainer.last_checkpoint = path
    record = trainer.engine.lr_scheduler
    record.steps_done = trainer.state.steps_done
    trainer.plan = replace(trainer.plan, schedule=schedule_to_follow(record, trainer.config.optimizer, path))
    record.schedule = trainer.plan.schedule
    if (other_data := data_change(trainer, path, client_state.get(DATA))) is not None:
        log.warning("%s", other_data)
    for changed in (batch_change(path, trainer.plan.batch), length_change(path, trainer.plan.train_iters)):
        if changed is not None:
            log.info("%s", changed)
    if trainer.finished:
        log.info("%s is at step %d of %d: there is nothing left to train.", path, trainer.state.iteration, trainer.plan.train_iters)
    else:
        log.info("Going on from %s, step %d of %d.", path, trainer.state.iteration, trainer.plan.train_iters)


def data_change(trainer: Trainer, path: Path, facts: Any) -> str | None:
    """A sentence if a run that goes on from `path` reads other data than before; the user may want that. None: the data is the same or not known.

    `facts`: the facts about its data in the checkpoint. None, as in checkpoints of GPT-NeoX: the keys of its configuration are compared.
    """
    data = trainer.config.data
    try:
        found = changes(facts, trainer.data_facts) if facts is not None else changed_keys(read_config(path), data)
    except (KeyError, TypeError, AttributeError):  # facts of another version of this package
        return None
    if not found:
        return None
    return (
        f"The data is not what it was when {path} was saved: {'; '.join(found)}. The run goes on at sample {trainer.state.consumed_samples:,} of "
        "the new data, so some text may be read twice or not at all. If you do not want that, stop the run and give the earlier data."
    )


def check_optimizer_type(path: Path, config: OptimizerConfig) -> None:
    """Raises CheckpointError if the optimizer's state at `path` belongs to another type of optimizer. A state that does not name its type is
    accepted."""
    stored = read_config(path)
    if "optimizer" not in stored:
        return
    before = "Adam8bit" if stored.get("use_bnb_optimizer") else stored["optimizer"]["type"]
    if SAME_STATE.get(before, before) != SAME_STATE.get(config.optimizer_type, config.optimizer_type):
        raise CheckpointError(
            f"{path} was trained with the optimizer {before}. This run uses {config.optimizer_type}, which cannot read that state. Set "
            f"optimizer.type: {before}, or add `-o no_load_optim=true` to go on from the weights alone with a fresh optimizer."
        )


def find_start(start: Start, config: CheckpointConfig) -> Path:
    """The checkpoint to load. If it does not exist, raises CheckpointError, which names the checkpoints that exist and says how to start without
    one."""
    try:
        return find_checkpoint_together(start.directory, config.iteration)
    except NoCheckpointError as error:
        raise NoCheckpointError(
            f"{error} To start from new weights, leave `load` out. To go on from `save` if it holds a checkpoint, and else start new, "
            "write `resume_if_exists: true` in place of `load`."
        ) from error


def compare_logits(trainer: Trainer, path: Path, stored: Any) -> str:
    """A sentence on whether the loaded model gives the logits that were `stored`. Raises CheckpointError when it does not."""
    return forward_check.check_validation_logits(
        path,
        stored,
        partial(evaluation_logits, trainer.engine),
        positions=trainer.plan.seq_length,
        vocabulary=trainer.checkpoint_args["padded_vocab_size"],
        dtype=DTYPES[trainer.config.precision],
    )


def choose_start(config: CheckpointConfig) -> Start | None:
    """The place to load from. None: new weights.

    Raises CheckpointError if `save` already holds checkpoints and the configuration does not say that this run goes on from them.
    """
    saved = layout.iterations_in(Path(config.save)) if config.save is not None and Path(config.save).is_dir() else []
    if config.resume_if_exists and config.save is not None and saved:
        return Start(Path(config.save), go_on=True)
    if config.load is not None and not (config.resume_if_exists and is_same_directory(config.load, config.save)):
        return Start(Path(config.load), go_on=not config.finetune)
    if saved:
        raise CheckpointError(
            f"save: {config.save} already holds checkpoints (up to step {max(saved)}), and the configuration does not say to go on from them. "
            f"Set `load: {config.save}` or `resume_if_exists: true` to go on, or choose another directory."
        )
    return None


def is_same_directory(load: str, save: str | None) -> bool:
    """Whether a run loads from where it saves, as NeoX's configurations have it."""
    return save is not None and Path(load).resolve() == Path(save).resolve()
