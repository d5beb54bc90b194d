"""Rows that processes send each other, in numbers that differ from one to the other.

Shapes: R rows sent; Q rows received; ... what is in a row; P processes of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.mpu.groups import Group


class Splits:
    """How many rows go to each process of the group, and how many come from each."""

    def __init__(self, sent: Sequence[int], received: Sequence[int]) -> None:
        self.sent, self.received = list(sent), list(received)

    @property
    def back(self) -> Splits:
        """The way back."""
        return Splits(self.received, self.sent)


class Flight:
    """An exchange during which this process computes something else, in the forward and in the backward pass."""

    def __init__(self, splits: Splits, group: Group) -> None:
        self.splits, self.group = splits, group
        self._work: Any = None
        self._landing = self._sent = torch.empty(0)

    def launch(self, x_R: Tensor) -> Tensor:
        """Starts it. What it returns has no values yet: give it to `land`."""
        if self.group.size == 1:
            return x_R
        launched: Tensor = _Launch.apply(x_R, self)
        return launched

    def land(self, launched: Tensor) -> Tensor:
        """[Q, ...]: waits for the rows."""
        if self.group.size == 1:
            return launched
        landed: Tensor = _Land.apply(launched, self)
        return landed

    def start(self, x: Tensor, splits: Splits) -> Tensor:
        """Starts without a gradient."""
        self._sent = x.contiguous()
        self._landing = x.new_empty(sum(splits.received), *x.shape[1:])
        self._work = torch.distributed.all_to_all_single(
            self._landing, self._sent, splits.received, splits.sent, group=self.group.handle, async_op=True
        )
        return self._landing

    def wait(self) -> Tensor:
        """The rows."""
        self._work.wait()
        landed, self._landing, self._sent = self._landing, torch.empty(0), torch.empty(0)
        return landed


def exchange(x_R: Tensor, splits: Splits, group: Group) -> Tensor:
    """[Q, ...]: the rows from every process, in the order of the processes. The gradient goes the way back. Collective."""
    flight = Flight(splits, group)
    return flight.land(flight.launch(x_R))


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(x_R, flight.splits)

    @staticmethod
    def backward(ctx: Any, _started: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.flight.wait(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launched: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait().view_as(launched)

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.start(grad_Q, ctx.flight.splits.back)
        return grad_Q, None  # stands for the rows on their way, which `_Launch` waits for


def gather_counts(count: Tensor, group: Group) -> Tensor:
    """[P, ...]: the counts of every process, on every process. Collective."""
    if group.size == 1:
        return count[None]
    counts = [torch.empty_like(count) for _ in range(group.size)]
    torch.distributed.all_gather(counts, count.contiguous(), group=group.handle)
    return torch.stack(counts)


def reordered(x_R: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """x[order], where `order` is a permutation; its gradient is a copy of rows too, and adds nothing up."""
    y: Tensor = _Reordered.apply(x_R, order_R, inverse_R)
    return y


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, inverse_R)
        return x_R.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        return grad_R.index_select(0, ctx.saved_tensors[1]), None, None
