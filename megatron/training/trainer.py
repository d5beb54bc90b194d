"""The training loop. What happens between steps is a callback's business."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.held import Share
from megatron.checkpoint.weights import Expected
from megatron.config.neox import NeoXConfig
from megatron.config.training import Batch
from megatron.data.changed import data_facts
from megatron.data.indexed import DatasetError
from megatron.data.loader import Batches, Datasets
from megatron.data.sampler import MicroBatchSampler, Start
from megatron.mpu.topology import Topology
from megatron.training.callbacks.base import Callback
from megatron.training.health import Health
from megatron.training.schedule import Schedule, learning_rate
from megatron.training.state import TrainingState
from megatron.training.step import StepMetrics, take_step


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its length, its batch sizes, its learning rate."""

    train_iters: int
    batch: Batch
    seq_length: int
    schedule: Schedule
    masked_token: int | None
    """Predictions after this token do not count in the loss. None: all count."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_ * self.seq_length


class Trainer:
    """Holds a run together: engine, data, plan, state, callbacks."""

    def __init__(self, config: NeoXConfig, plan: Plan, topology: Topology, *, engine: Any, datasets: Datasets, expected: Expected) -> None:
        self.config = config
        self.plan = plan
        self.topology = topology
        self.engine = engine
        self.datasets = datasets
        self.expected = expected
        """The description of the model that every checkpoint holds."""
        self.share = Share(topology, getattr(engine.module, "cuts", {}), config.training.seed)
        """This process's part of the weights, for checkpoints."""
        self.data_facts = data_facts(config.data, datasets, {"seed": config.training.seed, "seq_length": plan.seq_length})
        """Facts about the data that the run reads. Every checkpoint holds them."""
        self.state = TrainingState()
        self.health = Health()
        self.callbacks: Sequence[Callback] = ()
        self.origin: str | None = None
        """The Hugging Face class of an imported model (`layout.ORIGIN_KEY`). None: the model was not imported."""
        self.last_checkpoint: Path | None = None
        """Newest good checkpoint of this run, loaded or saved; None before the first."""
        self.stop_requested: str | None = None
        """The reason to end the loop after this step. None: there is no reason. The same on every process."""
        self.exit_status = 0
        """The exit status of the process: 128 + n after signal n, 1 after a failure to write. The same on every process."""
        self.failures: list[str] = []
        """Sentences about files, other than checkpoints, that this process could not write. After one of them the run saves and stops."""

    @property
    def checkpoint_args(self) -> Mapping[str, Any]:
        """NeoX's `args`, which every checkpoint holds."""
        return self.expected.args

    def fit(self) -> None:
        """Train to the end of the plan, or until a callback asks to stop."""
        for callback in self.callbacks:
            callback.before_training(self)
        data = self.training_batches()
        while self.state.iteration < self.plan.train_iters and self.stop_requested is None:
            rate = learning_rate(self.plan.schedule, self.state.steps_done)
            metrics = take_step(
                self.engine,
                data,
                learning_rate=rate,
                masked_token=self.plan.masked_token,
                per_token=self.config.training.calculate_per_token_loss,
                before_update=self.before_update,
            )
            self.count(metrics)
            for callback in self.callbacks:
                callback.after_step(self, metrics)
        data.close()
        for callback in reversed(self.callbacks):
            callback.after_training(self)

    def before_update(self) -> None:
        for callback in self.callbacks:
            callback.before_update(self)

    def training_batches(self) -> Batches:
        """This process's micro-batches, from the current step of the run on."""
        if self.datasets.train is None:
            raise DatasetError("there is no training data: set data_path or train_data_paths")
        micro, processes = self.plan.batch.micro, self.topology.data_parallel_size
        self.state.samples_at_once = self.state.samples_at_once or micro * processes
        sampler = MicroBatchSampler(
            len(self.datasets.train),
            micro_batch=micro,
            rank=self.topology.data_parallel_rank,
            world_size=processes,
            start=Start(self.state.consumed_samples, self.state.samples_at_once),
        )
        return Batches(self.datasets.train, sampler, self.config.data.num_workers)

    def count(self, metrics: StepMetrics) -> None:
        state = self.state
        state.iteration += 1
        state.consumed_samples += self.plan.batch.global_
        state.consumed_tokens += self.plan.tokens_per_step
        state.skipped += not metrics.applied
        if metrics.is_empty:
            return  # there was nothing to learn, which is no failure
        state.nonfinite += not math.isfinite(metrics.lm_loss)
        state.skipped_in_a_row = 0 if metrics.applied else state.skipped_in_a_row + 1
        self.health.after_step(metrics, iteration=state.iteration, in_a_row=state.skipped_in_a_row)

    @property
    def finished(self) -> bool:
        return self.state.iteration >= self.plan.train_iters
