"""From a configuration to a trainer that is ready to go, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megatron.config.neox import NeoXConfig
from megatron.config.size import padded_vocab_size
from megatron.config.training import resolve_batch
from megatron.data.loader import Datasets, SamplePlan, build_data
from megatron.data.sampler import MicroBatchSampler
from megatron.data.tokenizer import Tokenizer, build_tokenizer, end_of_document
from megatron.model.gpt import build_model
from megatron.mpu.topology import Topology
from megatron.training.engine import build_engine
from megatron.training.schedule import schedule_of
from megatron.training.trainer import Plan, Trainer


def build_trainer(config: NeoXConfig, topology: Topology) -> Trainer:
    """Tokenizer, data, model and engine as configured; no checkpoint is loaded yet."""
    tokenizer = build_tokenizer(config.data)
    plan = build_plan(config, tokenizer, topology)
    samples = plan_samples(config, plan)
    datasets = build_data(config.data, seq_length=plan.seq_length, plan=samples, seed=config.training.seed, vocab_size=tokenizer.vocab_size)
    check_evaluation_data(datasets, plan, topology)
    vocabulary = padded_vocab_size(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by)
    model = build_model(config.model, config.moe, vocabulary, seed=config.training.seed)
    engine = build_engine(config, model, world_size=topology.world_size)
    seed_random(config.training.seed + topology.data_parallel_rank)
    return Trainer(config, plan, topology, engine=engine, datasets=datasets, checkpoint_args=checkpoint_args(config, vocabulary))


def seed_random(seed: int) -> None:
    """What dropout and jitter draw from; each data-parallel process has its own stream."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_evaluation_data(datasets: Datasets, plan: Plan, topology: Topology) -> None:
    """Raises DatasetError now, not at the first evaluation, when a held-out part is too small for one batch."""
    for dataset in (datasets.valid, datasets.test):
        if dataset is not None:
            MicroBatchSampler(len(dataset), micro_batch=plan.batch.micro, rank=0, world_size=topology.data_parallel_size)


def build_plan(config: NeoXConfig, tokenizer: Tokenizer, topology: Topology) -> Plan:
    assert config.training.train_iters is not None
    return Plan(
        train_iters=config.training.train_iters,
        batch=resolve_batch(config.training, topology.data_parallel_size),
        seq_length=config.model.seq_length,
        schedule=schedule_of(config),
        masked_token=end_of_document(tokenizer, "eod_mask_loss") if config.data.eod_mask_loss else None,
    )


def plan_samples(config: NeoXConfig, plan: Plan) -> SamplePlan:
    """How many samples each part of the data has to give, counted as NeoX does (data_utils): the sample order depends on it."""
    training = config.training
    evaluations = plan.train_iters // training.eval_interval + 1
    return SamplePlan(
        train_samples=plan.train_iters * plan.batch.global_,
        valid_samples=evaluations * training.eval_iters * plan.batch.global_,
        test_samples=training.eval_iters * plan.batch.global_,
    )


def checkpoint_args(config: NeoXConfig, vocabulary: int) -> dict[str, Any]:
    """NeoX's `args` in a checkpoint: what a later load compares (neox.md 3.7)."""
    model = config.model
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "padded_vocab_size": vocabulary,
        "tokenizer_type": config.data.tokenizer_type,
        "model_parallel_size": config.parallel.model_parallel_size,
    }
