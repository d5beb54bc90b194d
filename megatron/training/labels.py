"""Counts the predictions of a step that count in its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.mpu.collectives import sum_over_data_parallel
from megatron.training.loss import next_token_targets

Batch = dict[str, Tensor]


class Labels(NamedTuple):
    """Counts of one step, over all processes."""

    counted: int
    """Predictions that count in the loss."""
    micro_batches: int
    without: int
    """Micro-batches in which no prediction counts."""

    @property
    def per_micro_batch(self) -> float:
        """Each micro-batch's summed loss is divided by this number. The mean over micro-batches is then the mean over all labels of the step."""
        return self.counted / self.micro_batches


def masks(batch: Batch, masked_token: int | None) -> bool:
    """Whether some predictions of this micro-batch may not count in the loss."""
    return masked_token is not None or "label" in batch


def count(batch: Batch, masked_token: int | None) -> int:
    """The number of predictions of this micro-batch that count. The micro-batch must be on the CPU."""
    mask_BS = next_token_targets(batch["text"], batch.get("label"), masked_token=masked_token).loss_mask_BS
    return batch["text"][:, 1:].numel() if mask_BS is None else int(mask_BS.count_nonzero())


def look_ahead(batches: Iterator[Batch], number: int, *, masked_token: int | None, device: torch.device) -> tuple[Iterator[Batch], Labels | None]:
    """The next `number` micro-batches and their counts. Counts None: all predictions count, and each micro-batch is read only when it is used.

    If some predictions may not count, this is a collective: every process calls it.
    """
    first = next(batches)
    if not masks(first, masked_token):
        return itertools.chain([first], batches), None
    held = [first, *itertools.islice(batches, number - 1)]
    return iter(held), count_labels(held, masked_token=masked_token, device=device)


def count_labels(held: Sequence[Batch], *, masked_token: int | None, device: torch.device) -> Labels:
    """Of these micro-batches and those of all other processes."""
    counts = [count(batch, masked_token) for batch in held]
    mine = torch.tensor([sum(counts), len(counts), counts.count(0)], dtype=torch.int64)
    several = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return Labels(*sum_over_data_parallel(mine.to(device) if several else mine).tolist())
