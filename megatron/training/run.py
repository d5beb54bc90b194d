"""Runs one launch of a training run, from the configuration to the end."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path

from rich.console import Console

from megatron.checkpoint.lock import RunLock
from megatron.checkpoint.ranks import gather, together
from megatron.config.loader import LoadedConfig
from megatron.config.neox import check_device, check_trainable, rounding_notice
from megatron.config.size import count_parameters
from megatron.monitor.console import ProgressDisplay, configure_logging
from megatron.monitor.guarded import OutputFailed
from megatron.monitor.sinks import check_sinks
from megatron.monitor.tee import copied_streams
from megatron.mpu.topology import ONE, Topology
from megatron.training.callbacks.build import Measurements, build_callbacks, build_sinks
from megatron.training.callbacks.stop import FAILURE
from megatron.training.health import TrainingDiverged, way_back
from megatron.training.optimizer import choose_optimizer
from megatron.training.process import start_process
from megatron.training.resume import resume
from megatron.training.setup import build_trainer
from megatron.training.trainer import Trainer
from megatron.training.watch import watched

log = logging.getLogger(__name__)


def train(loaded: LoadedConfig, measurements: Measurements | None = None) -> Trainer:
    """Trains as configured, from new weights or from a checkpoint, and returns the trainer in its last state.

    `measurements` makes callbacks that this package cannot know: they generate, or need packages for evaluation. None: there are none.

    The trainer's `exit_status` is not 0 if a signal ended the run.

    Problems with the configuration, the data, a checkpoint or the disk raise the ValueError of that package, with a sentence for the user. A loss
    that
    stays NaN or infinite, or a last evaluation that gives one, raises TrainingDiverged. If a file other than a checkpoint could not be written, the
    run is saved first and then raises OutputFailed.
    """
    config = loaded.config
    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as cleanup:
        cleanup.callback(configure_logging, rank=rank)  # when the streams are no longer copied
        failures = cleanup.enter_context(copied_streams(config.logging.log_dir, rank=rank))  # before DeepSpeed keeps a stream for itself
        console = configure_logging(rank=rank)
        topology = start_process(
            backend=config.parallel.distributed_backend, threads=config.launcher.threads_per_process, layout=config.parallel.layout
        )
        watcher = cleanup.enter_context(watched(topology, config.launcher.collective_timeout_s, device_type=os.environ["DS_ACCELERATOR"]))
        check_trainable(config, topology.data_parallel_size)
        check_device(config, os.environ["DS_ACCELERATOR"])
        check_sinks(config.logging)
        choose_optimizer(config.optimizer, os.environ["DS_ACCELERATOR"])
        if config.checkpoint.save is not None:
            cleanup.callback(lock(Path(config.checkpoint.save), topology).close)
        trainer = build_trainer(config, topology)
        trainer.failures = failures
        announce(trainer, loaded)
        resume(trainer)
        if watcher is not None:
            watcher.observer.follow(lambda: trainer.state.iteration)
        trainer.callbacks = build_callbacks(trainer, loaded, build_sinks(trainer), display(trainer, console), measurements)
        for callback in trainer.callbacks:
            cleanup.callback(callback.close)
        trainer.fit()
        end_together(trainer)
    return trainer


def end_together(trainer: Trainer) -> None:
    """Says how a run ended that did not end as planned. Raises TrainingDiverged and OutputFailed.

    No process leaves before the others are done: the launcher ends all of them when the first one returns something other than 0.
    """
    failures = [sentence for sentences in gather(trainer.failures) for sentence in sentences]
    if failures:
        trainer.exit_status = FAILURE
        if trainer.failures:
            raise OutputFailed(
                " ".join(dict.fromkeys(failures)) + f" {way_back(trainer.last_checkpoint)} Free space or choose another disk, then start again."
            )
    elif trainer.stop_requested is not None and trainer.exit_status and not trainer.finished:
        again = trainer.config.checkpoint.resume_if_exists or trainer.config.checkpoint.save is None
        how = "The same command goes on from there." if again else "With `resume_if_exists: true` the same command goes on from there."
        log.info("%s%s", way_back(trainer.last_checkpoint), f" {how}" if trainer.last_checkpoint is not None else "")
    elif (trouble := trainer.health.trouble or trainer.health.weights) is not None:
        raise TrainingDiverged(f"The run ended at step {trainer.state.iteration} and is not good: {trouble}. {way_back(trainer.last_checkpoint)}")
    elif trainer.finished:
        trainer.exit_status = 0


def lock(directory: Path, topology: Topology) -> ExitStack:
    """Locks `directory` against other runs until it is closed. Raises RunLockError on every process if another run holds the lock."""
    held = ExitStack()
    together(lambda: held.enter_context(RunLock(directory) if topology.is_first else nullcontext()), only_rank=0)
    return held


def display(trainer: Trainer, console: Console) -> ProgressDisplay | None:
    """The progress display. It exists on the first process, if it was asked for or if there is a terminal. None: plain lines."""
    wanted = trainer.config.logging.progress
    if not trainer.topology.is_first or wanted == "plain" or (wanted == "auto" and not console.is_terminal):
        return None
    return ProgressDisplay(console, total=trainer.plan.train_iters, done=trainer.state.iteration)


def announce(trainer: Trainer, loaded: LoadedConfig) -> None:
    """Logs the first lines of a run: the ignored keys, the model, the amount of data."""
    for notice in loaded.notices:
        log.info("%s", notice)
    plan, topology = trainer.plan, trainer.topology
    if rounded := rounding_notice(trainer.config, topology.data_parallel_size):
        log.warning("%s%s.", rounded[0].upper(), rounded[1:])
    words = trainer.checkpoint_args["padded_vocab_size"]
    parameters = count_parameters(trainer.config.model, trainer.config.moe, words).total_sum
    log.info(
        "%s parameters, %s, ZeRO %d, %s.", f"{parameters:,}", loaded.config.precision, trainer.engine.zero_optimization_stage(), trainer.engine.device
    )
    layout = topology.layout
    if layout != ONE:
        log.info(
            "%d processes: %d tensor x %d pipeline x %d data parallel, experts over %d of the data-parallel ones.",
            topology.world_size,
            layout.tensor,
            layout.pipe,
            topology.data_parallel_size,
            layout.expert,
        )
    log.info(
        "%s steps of %s tokens (%d sequences of %d, %d replica(s) x %d micro-batch x %d accumulation steps): %s tokens in all.",
        f"{plan.train_iters:,}",
        f"{plan.tokens_per_step:,}",
        plan.batch.global_,
        plan.seq_length,
        topology.data_parallel_size,
        plan.batch.micro,
        plan.batch.accumulation,
        f"{plan.train_iters * plan.tokens_per_step:,}",
    )
