"""Where tensors are shared among the tensor-parallel processes: what goes into such a part of the model, and what comes out of it, with gradients.

Shapes: B batch; S sequence; D model width; `...` any dimensions.

    enter   the same x on every process -> x, its gradient summed over the processes      (column-parallel input)
    leave   a part of a sum on every process -> the sum, its gradient as it is            (row-parallel output)
With sequence parallelism (Korthikanti et al., 2022, section 4.2.2) each process holds its part of every sequence outside; `enter` gathers, `leave`
sums and cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.kernels.precision import linear
from megatron.mpu.groups import ALONE as ONE_PROCESS
from megatron.mpu.groups import Group

SEQUENCE = 1
"""The dimension of the sequence in [B, S, D]."""


@dataclass(frozen=True)
class Region:
    """A part of the model that the processes of `group` share. `sequence`: outside of it, each holds its part of every sequence."""

    group: Group = ONE_PROCESS
    sequence: bool = False

    def enter(self, x_BSD: Tensor) -> Tensor:
        """x of the whole sequence, for weights of which each process has a part."""
        if self.group.size == 1:
            return x_BSD
        return gather(x_BSD, self.group, SEQUENCE, summed=True) if self.sequence else copied(x_BSD, self.group)

    def leave(self, y_BSD: Tensor) -> Tensor:
        """The sum of what the processes have; of this process's part of the sequence."""
        if self.group.size == 1:
            return y_BSD
        return reduced_part(y_BSD, self.group, SEQUENCE) if self.sequence else reduced(y_BSD, self.group)

    def whole(self, x_BSD: Tensor) -> Tensor:
        """x of the whole sequence, for what every process computes alike (a router)."""
        return gather(x_BSD, self.group, SEQUENCE, summed=False) if self.sequence else x_BSD

    def part(self, x_BSD: Tensor) -> Tensor:
        """This process's part of a sequence that all have, where the processes hold parts outside."""
        return part(x_BSD, self.group, SEQUENCE) if self.sequence else x_BSD

    def copied(self, x: Tensor) -> Tensor:
        """x itself, its gradient summed over the processes."""
        return copied(x, self.group)

    def row(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """`layer` with a part of its inputs on each process, and with the whole bias."""
        if self.group.size == 1:
            y: Tensor = layer(x)
            return y
        y = self.leave(linear(x, layer.weight))
        return y if layer.bias is None else y + self._after_leaving(layer.bias)

    def _after_leaving(self, bias: Tensor) -> Tensor:
        return bias


@dataclass(frozen=True)
class InnerRegion(Region):
    """Within another region, which enters before and leaves after it: what it gives is a part of a sum."""

    def enter(self, x_BSD: Tensor) -> Tensor:
        """x, whose gradient others sum."""
        return x_BSD

    def leave(self, y_BSD: Tensor) -> Tensor:
        """y, which others sum."""
        return y_BSD

    def _after_leaving(self, bias: Tensor) -> Tensor:
        return bias * (self.group.rank == 0)  # it counts once in the sum


WHOLE = Region()
"""One process has everything."""


def copied(x: Tensor, group: Group) -> Tensor:
    """x; the gradient is summed over the group."""
    y: Tensor = x if group.size == 1 else _Collective.apply(x, _same, lambda grad: _sum(grad, group))
    return y


def reduced(x: Tensor, group: Group) -> Tensor:
    """The sum over the group; the gradient is passed as it is."""
    y: Tensor = x if group.size == 1 else _Collective.apply(x, lambda part: _sum(part, group), _same)
    return y


def gather(x: Tensor, group: Group, dim: int, *, summed: bool) -> Tensor:
    """The parts of all processes, joined along `dim`. `summed`: the processes use them differently, so their gradients are added up; else each
    process has the same gradient and takes its part."""
    if group.size == 1:
        return x
    backward: Callable[[Tensor], Tensor] = (lambda grad: _sum_part(grad, group, dim)) if summed else (lambda grad: _part(grad, group, dim))
    y: Tensor = _Collective.apply(x, lambda own: _gather(own, group, dim), backward)
    return y


def reduced_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """This process's part along `dim` of the sum over the group."""
    y: Tensor = x if group.size == 1 else _Collective.apply(x, lambda own: _sum_part(own, group, dim), lambda grad: _gather(grad, group, dim))
    return y


def part(x: Tensor, group: Group, dim: int) -> Tensor:
    """This process's part along `dim` of what all processes have; the gradient is gathered."""
    y: Tensor = x if group.size == 1 else _Collective.apply(x, lambda own: _part(own, group, dim), lambda grad: _gather(grad, group, dim))
    return y


class _Collective(torch.autograd.Function):
    """A linear function of a tensor over processes, and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjoint(grad), None, None


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    if group.size == 2 and x.device.type == "cpu":
        return _sum_of_two(x.contiguous(), group)
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group.handle)
    return total


def _sum_of_two(x: Tensor, group: Group) -> Tensor:
    """Each sends the other its own: with gloo two thirds of the time of an all-reduce (2,048 x 512 float32). Both get the same bits."""
    other, received = group.ranks[1 - group.rank], torch.empty_like(x)
    sent = torch.distributed.isend(x, other, group=group.handle)
    torch.distributed.recv(received, other, group=group.handle)
    assert sent is not None, "this process is in the group"
    sent.wait()
    return received.add_(x)


def _gather(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group.handle)
    return torch.cat(parts, dim)


def _part(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(group.size, dim)[group.rank].contiguous()


def _sum_part(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [piece.contiguous() for piece in x.chunk(group.size, dim)]
    total = torch.empty_like(parts[group.rank])
    torch.distributed.reduce_scatter(total, parts, group=group.handle)
    return total
