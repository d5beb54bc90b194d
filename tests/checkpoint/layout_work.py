"""Runs of a tiny model in any layout: what a process does, at the top of a module, so that it can be sent there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron.checkpoint import ranks
from megatron.checkpoint.engine import Contents
from megatron.checkpoint.save import save_checkpoint
from megatron.data.sampler import MicroBatchSampler
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_MOE, tiny_config
from megatron.training.callbacks.base import Callback
from megatron.training.callbacks.checkpoint import STATE

MORE = 5
"""Steps after the checkpoint."""


class Outcome(NamedTuple):
    """What a process saw in the steps after the checkpoint. `samples`: by micro-batch."""

    losses: list[float]
    samples: list[list[int]]
    random: float
    """A number that stands for PyTorch's random state before the first of them."""


def values(corpus: Path, **keys: Any) -> dict[str, Any]:
    """Key values of a tiny mixture of experts. Micro-batches are the same in every layout, because its losses look at one of them at a time."""
    return {
        **TINY_MOE,
        "data_path": str(corpus),
        "split": "80, 10, 10",
        "tokenizer_type": "CharLevelTokenizer",
        "train_iters": 3 + MORE,
        "eval_iters": 0,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        **keys,
    }


class Recorder(Callback):
    """The loss of every step; saves at one of them."""

    def __init__(self, save: Path | None, at: int) -> None:
        self.losses: list[float] = []
        self.save, self.at = save, at

    def after_step(self, trainer: Any, metrics: Any) -> None:
        self.losses.append(metrics.lm_loss)
        if self.save is not None and trainer.state.iteration == self.at:
            write(trainer, self.save)


def write(trainer: Any, directory: Path) -> Path:
    """Saves as the callback of a run does."""
    state = {"args": trainer.checkpoint_args, STATE: trainer.state.state_dict()}
    layered = trainer.config.parallel.pipe_parallel_size > 0
    contents = Contents(share=trainer.share, layer_files=layered)
    return save_checkpoint(trainer.engine, directory, trainer.state.iteration, client_state=state, documents={}, contents=contents)


def train(keys: Mapping[str, Any], save: str | None, again: str | None) -> Outcome:
    """Trains as configured; saves after step 3 under `save`. A run that goes on saves under `again` what it has loaded, before its first step."""
    import torch

    from megatron.training.process import start_process
    from megatron.training.resume import resume
    from megatron.training.setup import build_trainer

    config = tiny_config(keys)
    topology = start_process(backend=None, threads=1, layout=config.parallel.layout)
    trainer = build_trainer(config, topology)
    resume(trainer)
    random = torch.get_rng_state().sum().item()
    if again is not None:
        write(trainer, Path(again))
    recorder, samples = Recorder(None if save is None else Path(save), 3), list[list[int]]()
    trainer.callbacks = [recorder]
    original = MicroBatchSampler.__iter__

    def noted(sampler: MicroBatchSampler) -> Iterator[list[int]]:
        for indices in original(sampler):
            samples.append(indices)
            yield indices

    MicroBatchSampler.__iter__ = noted  # type: ignore[method-assign]
    try:
        trainer.fit()
    finally:
        MicroBatchSampler.__iter__ = original  # type: ignore[method-assign]
    ranks.gather(None)
    micro = trainer.plan.batch.accumulation
    return Outcome(recorder.losses[-MORE:], samples[-MORE * micro :], random)


def run(processes: int, keys: Mapping[str, Any], *, save: Path | None = None, again: Path | None = None) -> list[Outcome]:
    """`train` on so many processes."""
    return run_distributed(train, processes, dict(keys), None if save is None else str(save), None if again is None else str(again), backend=None)


def samples_by_step(outcomes: list[Outcome], replicas: list[int]) -> list[list[int]]:
    """The samples of each global batch, in ascending order, over the processes `replicas` (one of each data-parallel rank)."""
    steps = []
    for step in range(MORE):
        batch: list[int] = []
        for rank in replicas:
            own = outcomes[rank].samples
            each = len(own) // MORE
            batch += [index for micro in own[step * each : (step + 1) * each] for index in micro]
        steps.append(sorted(batch))
    return steps
