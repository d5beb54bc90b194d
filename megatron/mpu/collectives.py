"""Sums over processes, for values that are not gradients."""

from __future__ import annotations

from torch import Tensor

from megatron.mpu.groups import current_groups


def sum_over_data_parallel(count: Tensor) -> Tensor:
    """The sum over all data-parallel processes, as a new tensor. With one process: the tensor itself. Every process must call it."""
    return current_groups().data.sum(count)


def sum_over_replicas_and_stages(count: Tensor) -> Tensor:
    """The same over the stages of the pipeline too, where one stage has the values and the others have zeros."""
    return current_groups().pipe.sum(sum_over_data_parallel(count))
