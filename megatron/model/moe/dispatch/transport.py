"""How rows travel to the processes that hold their experts, and back: one interface, and the way over `torch.distributed`.

Shapes: T tokens; K experts per token; R rows that this process sends; Q rows that it receives; E experts of the layer; P expert-parallel processes,
each with E / P of them; N tensor-parallel processes, which have the same tokens and each L = E / P / N of these experts; D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.config.components import load_component
from megatron.kernels.dispatch import OP
from megatron.kernels.permute import Order, combine, permute, sort_by_group
from megatron.model.moe.dispatch.interface import Meanwhile
from megatron.mpu.exchange import Flight, Splits, exchange, reordered
from megatron.mpu.groups import Group

WayBack = Callable[[Tensor], Tensor]
"""y_QD, in the order in which the rows were received -> y_TD: each token's results, weighted and summed."""


class ExpertShare(NamedTuple):
    """Which processes share a layer's experts, and how many there are."""

    num_experts: int
    expert: Group
    tensor: Group

    @property
    def here(self) -> int:
        """L: experts of this process."""
        return self.num_experts // (self.expert.size * self.tensor.size)

    @property
    def first(self) -> int:
        """The number of this process's first expert among all."""
        return (self.expert.rank * self.tensor.size + self.tensor.rank) * self.here


class OwnChoices(NamedTuple):
    """The choices of experts that this tensor-parallel process has, of all expert-parallel ones: P * L experts in the order of (process, expert)."""

    expert_TK: Tensor
    """int64: 0 to P * L - 1, or P * L for an empty choice."""
    weight_TK: Tensor
    num_experts: int
    """P * L."""
    padded: bool
    """Whether there may be empty choices."""
    order: Order | None = None
    """The choices sorted by expert; None: nobody has sorted them yet."""


class Counts(NamedTuple):
    """Who sends how much, known to all processes."""

    rows_PL: Tensor
    """int64: rows from each process for each expert of this one."""
    received_PN: Tensor
    """float32: rows that each process received."""
    tokens_P: Tensor
    """int64: tokens of each process."""


class Transport(Protocol):
    """One way for rows to travel. It is made from a layer's `ExpertShare` and the implementation of `permute`."""

    def send(self, x_TD: Tensor, choices: OwnChoices, counts: Counts, meanwhile: Meanwhile) -> tuple[Tensor, WayBack]:
        """(x_QD, the way back): the rows for this process's experts, sorted by expert, within an expert by process, and there as they stood.
        It calls `meanwhile` once, while rows are on their way. Gradients go the same ways. Collective, and so is the way back."""
        ...


class ExchangeTransport:
    """Each choice of an expert is a row of its own: rows are sorted by expert and exchanged once, and the results once."""

    def __init__(self, share: ExpertShare, backend: str) -> None:
        self.share, self.backend = share, backend

    def send(self, x_TD: Tensor, choices: OwnChoices, counts: Counts, meanwhile: Meanwhile) -> tuple[Tensor, WayBack]:
        """As `Transport` says."""
        order = choices.order
        if order is None:
            order = sort_by_group(choices.expert_TK, choices.num_experts, padded=choices.padded, backend=self.backend)
        group = self.share.expert
        splits, order_Q, inverse_Q = self.route(order, counts)
        flight = Flight(splits, group)
        launched = flight.launch(permute(x_TD, order, backend=self.backend))
        meanwhile()
        x_QD = reordered(flight.land(launched), order_Q, inverse_Q)

        def back(y_QD: Tensor) -> Tensor:
            y_RD = exchange(reordered(y_QD, inverse_Q, order_Q), splits.back, group)
            return combine(y_RD, order, choices.weight_TK, backend=self.backend)

        return x_QD, back

    def route(self, order: Order, counts: Counts) -> tuple[Splits, Tensor, Tensor]:
        """(how many rows go where; the order from (process, expert) to (expert, process), and its inverse)."""
        splits = Splits(order.rows_G.view(self.share.expert.size, self.share.here).sum(1).tolist(), counts.rows_PL.sum(1).tolist())
        return splits, *_by_expert(counts.rows_PL)


def build_transport(name: str, device: str, *, share: ExpertShare, permute_backend: str) -> Transport:
    """The implementation `name` ("auto" or a name) of the op `dispatch`. Raises KernelUnavailable."""
    made: Transport = load_component(OP.resolve(name, device))(share, permute_backend)
    return made


def _by_expert(rows_PL: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse) from (process, expert) to (expert, process), each in the order of arrival."""
    experts = torch.arange(rows_PL.shape[1], device=rows_PL.device).repeat(rows_PL.shape[0])
    expert_Q = experts.repeat_interleave(rows_PL.flatten())
    order_Q = torch.sort(expert_Q, stable=True).indices
    inverse_Q = torch.empty_like(order_Q)
    inverse_Q[order_Q] = torch.arange(len(order_Q), device=order_Q.device)
    return order_Q, inverse_Q
