"""DeepEP as a transport: a token is sent once to each process that has an expert for it, with its weights, and copied to its experts there.

Shapes: T tokens; S tokens received; K experts per token; Q rows of the experts here, sorted by expert; D model width.

A process adds up what its experts made of a token, with the router's weights, and DeepEP adds up the sums of the processes. So a token with several
experts on one process travels once in each direction. Every process rounds its sum to bfloat16; with the exchange of rows there is one rounding.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.dispatch.deep_ep import Sizes, land, launch, send_back, shared_buffer
from megatron.kernels.permute import combine, permute, sort_by_group
from megatron.model.moe.dispatch.interface import Meanwhile
from megatron.model.moe.dispatch.transport import Counts, ExpertShare, OwnChoices, WayBack


class DeepEPTransport:
    """Sends tokens by DeepEP's kernels, which combine what they bring back."""

    def __init__(self, share: ExpertShare, backend: str) -> None:
        self.share, self.backend = share, backend

    def send(self, x_TD: Tensor, choices: OwnChoices, counts: Counts, meanwhile: Meanwhile) -> tuple[Tensor, WayBack]:
        """As `Transport` says. Raises KernelUnavailable where the package cannot open its buffer."""
        sizes = Sizes(x_TD.shape[1], choices.expert_TK.shape[1], int(counts.tokens_P.max()))
        buffer = shared_buffer(self.share.expert.handle).of(sizes)
        weight_TK = choices.weight_TK.float()
        expert_TK = choices.expert_TK.masked_fill(choices.expert_TK == choices.num_experts, -1)
        sent = launch(buffer, x_TD, expert_TK, weight_TK, num_experts=choices.num_experts)
        meanwhile()
        x_SD, weight_SK = land(buffer, x_TD, weight_TK, sent)
        group_SK = sent.expert_SK.long().masked_fill(sent.expert_SK < 0, self.share.here)  # empty: an expert of another process
        order = sort_by_group(group_SK, self.share.here, padded=True, backend=self.backend)

        def back(y_QD: Tensor) -> Tensor:
            return send_back(buffer, combine(y_QD, order, weight_SK, backend=self.backend), sent.handle)

        return permute(x_SD, order, backend=self.backend), back
