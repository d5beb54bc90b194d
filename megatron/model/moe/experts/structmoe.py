"""StructMoE (Sarwar et al., 2024): every expert has M low-rank experts (LoREs) inside, chosen for each row by a router of the expert's own.

Shapes: R routed rows, sorted by expert; E experts; M LoREs per expert; G = E*M; L LoREs per row; Q LoRE rank; D model width; F expert width.

Equation 2: H = x W_up + sum over the L chosen of (x pi_i A_i) B_i, before the activation. pi is the softmax over the expert's M router logits,
taken at the L largest, and divided by their sum only where `moe_lore_normalize` says so. In a gated expert the LoREs add to the up-projection
W_up, not to the gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import LoreChoice, grouped_lore
from megatron.kernels.permute import Order, sort_by_group
from megatron.model.initialization import Initializer, fill_each, zeros
from megatron.model.moe.experts.grouped import GroupedExperts
from megatron.model.moe.routers.topk import top_k
from megatron.model.moe.routing import LoreRouting

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class LoREs(nn.Module):
    """The LoREs of all experts of a layer and the experts' second routers; as a module it is the routing."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.num_experts, self.per_expert, self.rank = moe.moe_num_experts, moe.moe_num_lores, moe.moe_lore_rank
        self.top_l, self.normalize = moe.moe_lore_top_k, moe.moe_lore_normalize
        self.backend = moe.kernel_backends.get("grouped_gemm", "auto")
        count, width, expert_width = self.num_experts * self.per_expert, model.hidden_size, moe.expert_width(model)
        self.router = nn.Parameter(torch.empty(count, width))
        self.a = nn.Parameter(torch.empty(count * self.rank, width))
        self.b = nn.Parameter(torch.empty(count * self.rank, expert_width))
        fill_each(init.into, self.router.data, self.num_experts)
        fill_each(init.into, self.a.data, count)
        fill_each(zeros if moe.moe_lore_init == "zero" else init.into, self.b.data, count)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[LoreRouting, Order]:
        """The LoREs of every row, and the rows' order by LoRE. All experts' routers are one grouped product, in float32 (float64 for float64)."""
        dtype = torch.promote_types(x_RD.dtype, torch.float32)
        router_EMD = self.router.to(dtype).view(self.num_experts, self.per_expert, -1)
        logit_RM = grouped_gemm(x_RD.to(dtype), router_EMD, rows_E, transposed=True, backend=self.backend)
        probability_RM = logit_RM.softmax(-1)
        weight_RL, lore_RL = top_k(probability_RM, self.top_l, normalize=self.normalize)
        first_E = torch.arange(0, len(self.router), self.per_expert, device=x_RD.device)
        first_R = first_E.repeat_interleave(rows_E, output_size=x_RD.shape[0])
        order = sort_by_group(lore_RL + first_R[:, None], len(self.router))
        return LoreRouting(lore_RL, weight_RL, probability_RM, logit_RM, order.rows_G), order

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(a_GQD, b_GQF)."""
        return self.a.view(len(self.router), self.rank, -1), self.b.view(len(self.router), self.rank, -1)


class StructMoEExperts(GroupedExperts):
    """MLPs whose up-projection is the expert's own matrix plus the chosen LoREs."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.lores = LoREs(model, moe, init)
        self.num_lores = moe.moe_num_experts * moe.moe_num_lores
        self.backend = moe.kernel_backends.get("grouped_lore", "auto")

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting]:  # type: ignore[override]
        """(y_RD, the second routing, in the order of the given rows)."""
        routing, order = self.lores(x_RD, rows_E)

        def up(x_RD: Tensor, w1_EFD: Tensor) -> Tensor:
            a_GQD, b_GQF = self.lores.matrices()
            return grouped_lore(x_RD, w1_EFD, a_GQD, b_GQF, LoreChoice(routing.weight_RL, order), backend=self.backend)

        return self.mlp(x_RD, rows_E, up), routing
