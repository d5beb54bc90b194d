"""Loss on data that the model does not learn from."""

from __future__ import annotations

from typing import Any

import torch

from megatron.data.loader import TextDataset, batches
from megatron.model.gpt import GPTOutput
from megatron.mpu.topology import Topology
from megatron.training.step import Tally, forward


def evaluate(
    engine: Any,
    dataset: TextDataset,
    topology: Topology,
    *,
    first_batch: int,
    num_batches: int,
    masked_token: int | None,
) -> float:
    """Mean loss per token over `num_batches` micro-batches on every process, from micro-batch `first_batch` of the data's order.

    It depends on its arguments only, so a resumed run evaluates on the same samples; nothing random is drawn.
    """
    stream = batches(
        dataset,
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        rank=topology.data_parallel_rank,
        world_size=topology.data_parallel_size,
        start_iteration=first_batch,
    )
    tally = Tally()
    engine.eval()
    try:
        with torch.no_grad():
            for _ in range(num_batches):
                tally.add(forward(engine, next(stream), masked_token=masked_token))
    finally:
        engine.train()
        stream.close()
    return tally.totals()[0]


def evaluation_logits(engine: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of the engine's model in evaluation, on its device. Collective under ZeRO 3."""
    engine.eval()
    try:
        with torch.no_grad():
            output: GPTOutput = engine(tokens_BS.to(engine.device))
    finally:
        engine.train()
    assert output.logits_BSV is not None
    return output.logits_BSV
