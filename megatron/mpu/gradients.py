"""Gradients of weights that several processes hold: sums over the processes where each has a part of the gradient, and the norm of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron.mpu.groups import Group, Groups


class SharedRows(NamedTuple):
    """Keys and values of heads that several tensor-parallel processes hold: keys first, then as many values."""

    before: int
    """Rows of the process's weight before them."""
    first: int
    """Where the process's keys begin among those of all heads."""
    rows: int
    """Rows of all heads' keys."""
    owned: bool
    """Whether this process is the one that counts for them."""


class Marks(NamedTuple):
    """What the model says of a weight (`model/divide.py`). They lie on the parameter itself: DeepSpeed reads some of them there."""

    summed_over: Group | None = None
    """The processes whose gradients make up the whole gradient of a weight that all of them hold."""
    shared_rows: SharedRows | None = None
    """The last rows of a divided weight, which neighbours hold too."""
    model_parallel: bool = False
    """Other tensor-parallel processes hold other parts (DeepSpeed's name)."""
    allreduce: bool = True
    """False: other data-parallel processes hold other experts (DeepSpeed's name)."""
    group_name: str | None = None
    """DeepSpeed's name of the expert-parallel group."""
    ds_pipe_replicated: bool = False
    """A copy of a weight that another pipeline stage counts (DeepSpeed's name)."""


def marks_of(parameter: Tensor) -> Marks:
    """The marks of a parameter; those of a weight that was never divided are the defaults."""
    return Marks(**{name: getattr(parameter, name) for name in Marks._fields if hasattr(parameter, name)})


def sum_shared_gradients(module: nn.Module, tensor: Group) -> None:
    """From now on every backward pass leaves whole gradients on weights of which each process computes a part. Call it once, when the weights have
    their final format. Every process of the group has to run the same backward passes."""
    for parameter in module.parameters():
        marks = marks_of(parameter)
        if parameter.requires_grad and marks.summed_over is not None:
            parameter.register_hook(_summing(marks.summed_over))
        elif parameter.requires_grad and marks.shared_rows is not None:
            parameter.register_hook(_summing_rows(tensor, marks.shared_rows))


def _summing(group: Group) -> Callable[[Tensor], Tensor]:
    return lambda gradient: group.sum(gradient.contiguous())


def _summing_rows(group: Group, shared: SharedRows) -> Callable[[Tensor], Tensor]:
    def total(gradient: Tensor) -> Tensor:
        own = (gradient.shape[0] - shared.before) // 2
        everyones = gradient.new_zeros(2, shared.rows, *gradient.shape[1:])
        place = slice(shared.first, shared.first + own)
        everyones[:, place] = gradient[shared.before :].unflatten(0, (2, own))
        return torch.cat([gradient[: shared.before], group.sum(everyones)[:, place].flatten(0, 1)])

    return total


def over_processes(parameter: Tensor, numbers: Tensor, groups: Groups) -> Tensor:
    """Sums of numbers of this process's part of a weight, over the processes that hold its other parts. Collective."""
    marks = marks_of(parameter)
    if marks.model_parallel:
        numbers = groups.tensor.sum(numbers)
    return numbers if marks.allreduce else groups.expert.sum(numbers)


class GlobalNorm:
    """The norm of the gradients of a whole model, whichever processes hold them. Each gradient counts once."""

    def __init__(self, groups: Groups, parameters: Sequence[Tensor]) -> None:
        self.groups = groups
        every = [marks_of(parameter) for parameter in parameters]
        self.counted = [self._counts(marks) for marks in every]
        self.rows = [None if marks.shared_rows is None or marks.shared_rows.owned else marks.shared_rows.before for marks in every]
        self.expert = [not marks.allreduce for marks in every]

    def _counts(self, marks: Marks) -> bool:
        return not marks.ds_pipe_replicated and (marks.model_parallel or self.groups.tensor.rank == 0)

    def total(self, gradients: Sequence[Tensor | None], norm: Callable[[list[Tensor]], float]) -> float:
        """The norm of all gradients; `norm` computes that of a list. Collective; the gradients are already averaged over the replicas."""
        squares = torch.zeros(2, dtype=torch.float64)
        for kind, is_expert in enumerate((False, True)):
            own = [
                gradient[:rows]
                for gradient, counted, rows, expert in zip(gradients, self.counted, self.rows, self.expert, strict=True)
                if gradient is not None and counted and expert == is_expert
            ]
            squares[kind] = norm(own) ** 2 if own else 0.0
        squares = squares.to(_device(gradients))
        if self.groups.expert.size > 1:
            squares[1] = self.groups.expert.sum(squares[1:])[0]
        return math.sqrt(self.groups.model.sum(squares).sum().item())


def _device(gradients: Sequence[Tensor | None]) -> torch.device:
    """Where collectives run: nccl needs its tensors on the GPU."""
    return next((gradient.device for gradient in gradients if gradient is not None), torch.device("cpu"))
