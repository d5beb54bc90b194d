"""Experts of other processes: rows are sent to the process that holds their expert, computed there, and sent back. No token is ever dropped.

Shapes: T tokens; K experts per token; Q rows that this process receives; E experts of the layer; P expert-parallel processes, each with E / P of
them; N tensor-parallel processes, which have the same tokens and each L = E / P / N of these experts; D model width; M LoREs.

Experts lie in the order of (expert-parallel process, tensor-parallel process, expert). Among the tensor-parallel processes nothing is sent: each
takes the rows of its own experts, and the sum of their results is the layer's output, which the caller makes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.kernels.route.reference import totals
from megatron.model.moe.dispatch.interface import Computed, Meanwhile
from megatron.model.moe.dispatch.library import compute_of
from megatron.model.moe.dispatch.transport import Counts, ExpertShare, OwnChoices, Transport, build_transport
from megatron.model.moe.routing import LoreRouting, Routing
from megatron.mpu.exchange import Splits, exchange, gather_counts
from megatron.mpu.regions import gather

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig


class AllToAllDispatcher:
    """Says who sends what to whom; a `Transport` sends it, and the experts, or a library, compute it."""

    def __init__(self, moe: MoEConfig, share: ExpertShare) -> None:
        self.share = share
        self.compute = compute_of(moe)
        self.backend = moe.kernel_backends.get("permute", "auto")
        self.dispatch_backend = moe.kernel_backends.get("dispatch", "auto")
        self._transport: Transport | None = None

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        """`run_while` with nothing to compute beside it."""
        return self.run_while(x_TD, routing, experts, lambda: None)

    def run_while(self, x_TD: Tensor, routing: Routing, experts: Any, meanwhile: Meanwhile) -> Computed:
        """This process's part of the layer's output, complete where there is one tensor-parallel process. `rows_E` and the LoREs' counts are those
        of this process's tokens. `meanwhile` is called while rows are on their way."""
        rows_E = routing.rows_E(self.share.num_experts)
        choices, counts = self._own_choices(routing), self._counts(rows_E, len(x_TD))
        x_QD, back = self.transport(x_TD.device.type).send(x_TD, choices, counts, meanwhile)
        started = time.perf_counter()
        y_QD, lores = self.compute(experts, x_QD, counts.rows_PL.sum(0))
        overload_2 = overload(counts.received_PN, rows=len(x_QD), seconds=torch.nan if x_TD.is_cuda else time.perf_counter() - started)
        return Computed(back(y_QD), rows_E, None if lores is None else self._returned(lores, counts.rows_PL), overload_2)

    def use(self, transport: Transport) -> None:
        """From now on rows travel in this way."""
        self._transport = transport

    def transport(self, device: str) -> Transport:
        """How the rows travel; made when the first ones do."""
        if self._transport is None:
            self._transport = build_transport(self.dispatch_backend, device, share=self.share, permute_backend=self.backend)
        return self._transport

    def _own_choices(self, routing: Routing) -> OwnChoices:
        """Those of the experts that this tensor-parallel process and its likes have; of all where there is one."""
        share = self.share
        if share.tensor.size == 1:
            order = None if routing.softmax is None else routing.softmax.order
            return OwnChoices(routing.expert_TK, routing.weight_TK, share.num_experts, routing.padded, order)
        own = share.num_experts // share.tensor.size
        number_E = torch.full((share.num_experts + 1,), own, device=routing.expert_TK.device)  # an empty choice where an expert is elsewhere
        by_place = number_E[: share.num_experts].view(share.expert.size, share.tensor.size, share.here)
        by_place[:, share.tensor.rank] = torch.arange(own, device=number_E.device).view(share.expert.size, share.here)
        group_TK = number_E[routing.expert_TK]
        return OwnChoices(group_TK, routing.weight_TK * (group_TK < own), own, padded=True)

    def _counts(self, rows_E: Tensor, tokens: int) -> Counts:
        """The one exchange of counts: every process gets those of all."""
        share = self.share
        every_PC = gather_counts(torch.cat([rows_E, rows_E.new_tensor([tokens])]), share.expert)
        rows_PPNL = every_PC[:, :-1].reshape(share.expert.size, share.expert.size, share.tensor.size, share.here)
        return Counts(rows_PPNL[:, share.expert.rank, share.tensor.rank], rows_PPNL.sum((0, 3)).float(), every_PC[:, -1])

    def _returned(self, lores: LoreRouting, rows_PL: Tensor) -> LoreRouting:
        """The second routing with counts and sums of probabilities of this process's tokens, over all experts. Losses look at these.

        What is said of single rows stays that of the rows that this process computed.
        """
        share = self.share
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
