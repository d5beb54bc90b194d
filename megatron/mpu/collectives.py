"""Sums over processes, for values that are not gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_data_parallel(count: Tensor) -> Tensor:
    """The sum over all data-parallel processes, as a new tensor. With one process: the tensor itself. Every process must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_world_size() == 1:
        return count
    total = count.clone()
    torch.distributed.all_reduce(total)
    return total
