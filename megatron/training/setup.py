"""Makes a trainer from a configuration. Checks that cost little come first, so that mistakes are found early."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.weights import Expected
from megatron.config.neox import NeoXConfig
from megatron.config.size import padded_vocab_size
from megatron.config.training import Batch, TrainingConfig, resolve_batch
from megatron.data.indexed import DatasetError
from megatron.data.loader import Datasets, SamplePlan, build_data
from megatron.data.sampler import MicroBatchSampler
from megatron.data.tokenizer import Tokenizer, build_tokenizer, end_of_document
from megatron.model.divide import Divider
from megatron.model.gpt import GPT, build_model
from megatron.model.pipeline import build_stage
from megatron.mpu.groups import current_groups
from megatron.mpu.topology import Topology
from megatron.training.engine import build_engine
from megatron.training.evaluate import evaluations_until
from megatron.training.memory import check_training_fits
from megatron.training.schedule import schedule_of
from megatron.training.trainer import Plan, Trainer

log = logging.getLogger(__name__)


def build_trainer(config: NeoXConfig, topology: Topology) -> Trainer:
    """Tokenizer, data, model and engine as configured; no checkpoint is loaded yet. The trainer's config says how many steps `train_epochs` are."""
    tokenizer = build_tokenizer(config.data)
    batch = resolve_batch(config.training, topology.data_parallel_size)
    samples = plan_samples(config.training, batch)
    seq_length, seed, vocab_size = config.model.seq_length, config.training.seed, tokenizer.vocab_size
    datasets = after_the_first(
        lambda: build_data(
            config.data, seq_length=seq_length, plan=samples, seed=seed, vocab_size=vocab_size, number_documents=config.moe.asks_for_documents
        ),
        topology,
        shared=config.data.use_shared_fs,
    )
    config = settle_length(config, datasets, batch)
    plan = build_plan(config, tokenizer, batch)
    check_evaluation_data(datasets, plan, topology)
    vocabulary = padded_vocab_size(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by)
    check_training_fits(config, vocabulary, world_size=topology.data_parallel_size)
    engine = build_engine(config, model_of_process(config, vocabulary), world_size=topology.data_parallel_size)
    seed_random(config.training.seed + topology.data_parallel_rank + topology.pipe_rank * topology.data_parallel_size)
    return Trainer(config, plan, topology, engine=engine, datasets=datasets, expected=expected_model(config, tokenizer.vocab_size))


def model_of_process(config: NeoXConfig, vocabulary: int) -> GPT:
    """The part of the model that this process trains, with new weights. Raises PartitionError."""
    groups, seed = current_groups(), config.training.seed
    parallel = config.parallel
    divider = Divider(groups, sequence=parallel.sequence_parallel, by_width=parallel.moe_tensor_parallel == "width")
    if groups.pipe.size == 1:
        return build_model(config.model, config.moe, vocabulary, seed=seed, divider=divider)
    return build_stage(config.model, config.moe, vocabulary, seed=seed, method=config.parallel.pipe_partition_method, divider=divider)


def after_the_first(build: Callable[[], Datasets], topology: Topology, *, shared: bool) -> Datasets:
    """The result of `build`. One process calls it first (one of each machine if not `shared`), and the others then find the files that it wrote."""
    if topology.world_size == 1:
        return build()
    if topology.rank == 0 or (topology.local_rank == 0 and not shared):
        try:
            return build()
        finally:
            torch.distributed.barrier()
    torch.distributed.barrier()
    return build()


def settle_length(config: NeoXConfig, datasets: Datasets, batch: Batch) -> NeoXConfig:
    """The configuration with the number of steps for `train_epochs`: the largest that reads no sample more often than `train_epochs` times, as in
    NeoX.

    Raises DatasetError if that is less than one step.
    """
    if config.training.train_epochs is None or datasets.train is None:
        return config
    epochs, samples = config.training.train_epochs, len(datasets.train)
    at_once = batch.global_ // batch.accumulation
    steps = samples // at_once * epochs // batch.accumulation
    if not steps:
        raise DatasetError(
            f"train_epochs: {epochs} epoch(s) of {samples:,} training samples are less than one step of {batch.global_:,} samples. "
            "Use more text, more epochs, a smaller batch or a shorter seq_length"
        )
    log.info("train_epochs: %d epoch(s) of %s samples are %s steps of %d samples.", epochs, f"{samples:,}", f"{steps:,}", batch.global_)
    return config.model_copy(update={"training": config.training.model_copy(update={"train_iters": steps})})


def seed_random(seed: int) -> None:
    """Seeds the random numbers of dropout and jitter. Each data-parallel process of each pipeline stage has its own stream."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_evaluation_data(datasets: Datasets, plan: Plan, topology: Topology) -> None:
    """Raises DatasetError before training, and not only at the first evaluation, if a held-out part is too small for one batch."""
    for dataset in (datasets.valid, datasets.test):
        if dataset is not None:
            MicroBatchSampler(len(dataset), micro_batch=plan.batch.micro, rank=0, world_size=topology.data_parallel_size)


def build_plan(config: NeoXConfig, tokenizer: Tokenizer, batch: Batch) -> Plan:
    """The plan of the run. Raises TokenizerError if the end of documents must be masked but the tokenizer has no such token."""
    assert config.training.train_iters is not None
    return Plan(
        train_iters=config.training.train_iters,
        batch=batch,
        seq_length=config.model.seq_length,
        schedule=schedule_of(config),
        masked_token=end_of_document(tokenizer, "eod_mask_loss") if config.data.eod_mask_loss else None,
    )


def plan_samples(training: TrainingConfig, batch: Batch) -> SamplePlan:
    """How many samples each part of the data must give. They are counted as in NeoX, because the order depends on it. With `train_epochs`: one
    epoch each."""
    at_once = batch.global_ // batch.accumulation
    if training.train_iters is None:
        evaluated = None if training.eval_iters else 0
        return SamplePlan(train_samples=None, valid_samples=evaluated, test_samples=evaluated, samples_at_once=at_once)
    evaluations = evaluations_until(training, training.train_iters) + 1
    return SamplePlan(
        train_samples=training.train_iters * batch.global_,
        valid_samples=evaluations * training.eval_iters * batch.global_,
        test_samples=training.eval_iters * batch.global_,
        samples_at_once=at_once,
    )


def expected_model(config: NeoXConfig, vocab_size: int) -> Expected:
    """The description that a checkpoint of the configured model must have. `vocab_size`: the number of the tokenizer's entries."""
    return Expected(
        args=checkpoint_args(config, padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)),
        vocab_size=vocab_size,
        parallel_residual=config.model.gpt_j_residual,
        gqa_layout=config.checkpoint.gqa_layout,
    )


def checkpoint_args(config: NeoXConfig, vocabulary: int) -> dict[str, Any]:
    """NeoX's `args` in a checkpoint. A later load compares them."""
    model = config.model
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.max_position_embeddings,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "padded_vocab_size": vocabulary,
        "tokenizer_type": config.data.tokenizer_type,
        "model_parallel_size": config.parallel.model_parallel_size,
    }
