"""Experts of other processes: rows are sent to the process that holds their expert, computed there, and sent back. No token is ever dropped.

Shapes: T tokens; K experts per token; R rows that this process sends; Q rows that it receives; E experts of the layer; P expert-parallel processes,
each with E / P of them; N tensor-parallel processes, which have the same tokens and each L = E / P / N of these experts; D model width; M LoREs.

Experts lie in the order of (expert-parallel process, tensor-parallel process, expert). Among the tensor-parallel processes nothing is sent: each
takes the rows of its own experts, and the sum of their results is the layer's output, which the caller makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.permute import Order, combine, permute, sort_by_group
from megatron.kernels.route.reference import totals
from megatron.model.moe.dispatch.local import Computed
from megatron.model.moe.routing import LoreRouting, Routing
from megatron.mpu.exchange import Flight, Splits, exchange, gather_counts, reordered
from megatron.mpu.groups import Group
from megatron.mpu.regions import gather

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig


def nothing() -> None:
    """There is nothing else to compute."""


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


class Received(NamedTuple):
    """The rows of other processes for this one's experts."""

    splits: Splits
    rows_PL: Tensor
    """int64: rows from each process for each expert."""
    order_Q: Tensor
    """From the order of arrival (process, expert) to (expert, process)."""
    inverse_Q: Tensor
    received_PN: Tensor
    """float32: rows that each process received."""


class AllToAllDispatcher:
    """Sorts tokens by expert, exchanges counts once and rows twice."""

    def __init__(self, moe: MoEConfig, share: ExpertShare) -> None:
        self.share = share
        self.backend = moe.kernel_backends.get("permute", "auto")

    def run(self, x_TD: Tensor, routing: Routing, experts: Any, meanwhile: Callable[[], None] = nothing) -> Computed:
        """This process's part of the layer's output, complete where there is one tensor-parallel process. `rows_E` and the LoREs' counts are those
        of this process's tokens. `meanwhile` is called while rows are on their way."""
        rows_E = self._all_rows(routing)
        order, weight_TK = self._own_order(routing)
        received = self._receive(order.rows_G, rows_E)
        flight = Flight(received.splits, self.share.expert)
        launched = flight.launch(permute(x_TD, order, backend=self.backend))
        meanwhile()
        x_QD = flight.land(launched)
        started = time.perf_counter()
        y_QD, lores = experts(reordered(x_QD, received.order_Q, received.inverse_Q), received.rows_PL.sum(0))
        overload_2 = overload(received.received_PN, rows=len(x_QD), seconds=torch.nan if x_TD.is_cuda else time.perf_counter() - started)
        y_RD = exchange(reordered(y_QD, received.inverse_Q, received.order_Q), received.splits.back, self.share.expert)
        y_TD = combine(y_RD, order, weight_TK, backend=self.backend)
        return Computed(y_TD, rows_E, None if lores is None else self._returned(lores, received), overload_2)

    def _all_rows(self, routing: Routing) -> Tensor:
        """rows_E of this process's tokens."""
        if routing.softmax is not None:
            return routing.softmax.order.rows_G
        counts = torch.bincount(routing.expert_TK.flatten(), minlength=self.share.num_experts + 1)
        return counts[: self.share.num_experts]

    def _own_order(self, routing: Routing) -> tuple[Order, Tensor]:
        """The choices of experts that this tensor-parallel process has (of all expert-parallel ones), sorted, and their weights."""
        share = self.share
        if share.tensor.size == 1:
            if routing.softmax is not None:
                return routing.softmax.order, routing.weight_TK
            return sort_by_group(routing.expert_TK, share.num_experts, padded=routing.padded, backend=self.backend), routing.weight_TK
        own = share.num_experts // share.tensor.size
        number_E = torch.full((share.num_experts + 1,), own, device=routing.expert_TK.device)  # an empty choice where an expert is elsewhere
        by_place = number_E[: share.num_experts].view(share.expert.size, share.tensor.size, share.here)
        by_place[:, share.tensor.rank] = torch.arange(own, device=number_E.device).view(share.expert.size, share.here)
        group_TK = number_E[routing.expert_TK]
        return sort_by_group(group_TK, own, padded=True, backend=self.backend), routing.weight_TK * (group_TK < own)

    def _receive(self, sent_G: Tensor, rows_E: Tensor) -> Received:
        """The one exchange of counts: every process gets those of all, [P, E]."""
        share = self.share
        rows_PPNL = gather_counts(rows_E, share.expert).view(share.expert.size, share.expert.size, share.tensor.size, share.here)
        received_PN = rows_PPNL.sum((0, 3)).float()
        rows_PL = rows_PPNL[:, share.expert.rank, share.tensor.rank]
        sent = sent_G.view(share.expert.size, share.here).sum(1).tolist()
        order_Q, inverse_Q = _by_expert(rows_PL)
        return Received(Splits(sent, rows_PL.sum(1).tolist()), rows_PL, order_Q, inverse_Q, received_PN)

    def _returned(self, lores: LoreRouting, received: Received) -> LoreRouting:
        """The second routing with counts and sums of probabilities of this process's tokens, over all experts. Losses look at these.

        What is said of single rows stays that of the rows that this process computed.
        """
        share, rows_PL = self.share, received.rows_PL
        per_expert = lores.probability_RM.shape[1]
        rows_LP = rows_PL.t().flatten()
        total_PLM = totals(lores.probability_RM, rows_LP).view(share.here, share.expert.size, per_expert).transpose(0, 1)
        group_Q = torch.arange(len(rows_LP), device=rows_LP.device).repeat_interleave(rows_LP, output_size=len(lores.lore_RL))
        key = group_Q[:, None] * per_expert + lores.lore_RL
        count_PLM = torch.bincount(key.flatten(), minlength=len(rows_LP) * per_expert).view(share.here, share.expert.size, per_expert).transpose(0, 1)
        even = Splits([1] * share.expert.size, [1] * share.expert.size)
        total_PLM = exchange(total_PLM.contiguous(), even, share.expert)
        count_PLM = exchange(count_PLM.contiguous(), even, share.expert)
        total_PNLM = gather(total_PLM[:, None], share.tensor, 1, summed=False)
        count_PNLM = gather(count_PLM[:, None], share.tensor, 1, summed=False)
        return lores._replace(rows_G=count_PNLM.flatten(), total_EM=total_PNLM.reshape(share.num_experts, per_expert))


def overload(received_PN: Tensor, *, rows: int, seconds: float) -> Tensor:
    """float32 [2]: the most rows that a process received over the mean, and the seconds of a step that all lose by it.

    This process needed `seconds` for the forward pass of its `rows`. The backward pass takes about twice as long. The others wait for the process
    with the most rows; with even loads it would have the mean.
    """
    most, mean = received_PN.max(), received_PN.mean().clamp(min=1e-9)
    return torch.stack([most / mean, 3 * seconds / max(1, rows) * (most - mean)])


def _by_expert(rows_PL: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse) from (process, expert) to (expert, process), each in the order of arrival."""
    experts = torch.arange(rows_PL.shape[1], device=rows_PL.device).repeat(rows_PL.shape[0])
    expert_Q = experts.repeat_interleave(rows_PL.flatten())
    order_Q = torch.sort(expert_Q, stable=True).indices
    inverse_Q = torch.empty_like(order_Q)
    inverse_Q[order_Q] = torch.arange(len(order_Q), device=order_Q.device)
    return order_Q, inverse_Q
