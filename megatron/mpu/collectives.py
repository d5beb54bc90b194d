"""Sums over processes, for values that are not gradients."""

from __future__ import annotations

from torch import Tensor

from megatron.mpu.groups import current_groups


def sum_over_data_parallel(count: Tensor) -> Tensor:
    """The sum over all data-parallel processes, as a new tensor. With one process: the tensor itself. Every process must call it."""
    return current_groups().data.sum(count)
