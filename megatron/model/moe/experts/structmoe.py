"""StructMoE (Sarwar et al., 2024): every expert has M low-rank experts (LoREs) inside, chosen for each row by a router of the expert's own.

Shapes: R routed rows, sorted by expert; E experts; M LoREs per expert; G = E*M; L LoREs per row; Q LoRE rank; D model width; F expert width.

Equation 2: H = x W_up + sum over the L chosen of (x pi_i A_i) B_i, before the activation. pi is the softmax over the expert's M router logits,
taken at the L largest, and divided by their sum only where `moe_lore_normalize` says so.

    entangled    as equation 2, on the up-projection; in gated experts on the up-projection, the gate's, or both
    standalone   y + sum of (x pi_i A_i) B_i with B of the model's width: the paper's ablation "non-entangled LoREs" (section 4.3)
    gated        act(x W_up) * sum of (x pi_i A_i) B_i (the interaction `geglu` of the authors' fork)
Without LoRE routers (`moe_lore_routed: false`, section 4.3) each expert has one LoRE of rank M*Q that is always on, with pi = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.kernels.grouped_gemm import grouped_gemm
from megatron.kernels.grouped_lore import grouped_lore
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.kernels.route import Selection, route
from megatron.model.initialization import Initializer, fill_each, zeros
from megatron.model.moe.experts.grouped import GroupedExperts
from megatron.model.moe.routing import LoreRouting

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

Decision = tuple[LoreChoice | None, LoreRouting | None]
"""The choice that the kernels take, and the routing. None: nothing is routed, all rows of an expert use its LoRE."""


class LoREs(nn.Module):
    """The LoREs of all experts of a layer and the experts' second routers. As a module it is the routing."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer, *, width_out: int) -> None:
        super().__init__()
        self.num_experts, self.per_expert, self.rank = moe.num_experts, moe.moe_num_lores, moe.lore_rank
        self.selection = Selection(moe.moe_lore_top_k, moe.moe_lore_normalize)
        self.backend, self.route_backend = (moe.kernel_backends.get(op, "auto") for op in ("grouped_gemm", "route"))
        self.router = nn.Parameter(torch.empty(self.num_experts * self.per_expert, model.hidden_size))
        self.a, self.b = _factors(self.num_experts * self.per_expert, self.rank, model.hidden_size, width_out)
        fill_each(init.into, self.router.data, self.num_experts)
        self.fill(moe, init)

    def fill(self, moe: MoEConfig, init: Initializer) -> None:
        """Fills the factors: A like the layer's weights, B the same way or with zeros."""
        fill_each(init.into, self.a.data, len(self.a) // self.rank)
        fill_each(zeros if moe.moe_lore_init == "zero" else init.into, self.b.data, len(self.b) // self.rank)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> Decision:
        """The LoREs of every row. All experts' routers are one grouped product, in float32 (float64 for float64)."""
        dtype = torch.promote_types(x_RD.dtype, torch.float32)
        router_EMD = self.router.to(dtype).view(self.num_experts, self.per_expert, -1)
        logit_RM = grouped_gemm(x_RD, router_EMD, rows_E, transposed=True, backend=self.backend)
        routed = route(logit_RM, self.selection, rows_E, allow_nan=True, backend=self.route_backend)
        routing = LoreRouting(routed.choice_NK, routed.weight_NK, routed.probability_NC, logit_RM, routed.order.rows_G, routed.total_PC)
        return LoreChoice(routed.weight_NK, routed.order), routing

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(a_GQD, b_GQF)."""
        return self.a.view(-1, self.rank, self.a.shape[1]), self.b.view(-1, self.rank, self.b.shape[1])

    @property
    def count(self) -> int:
        """G."""
        return len(self.a) // self.rank


class UnroutedLoREs(LoREs):
    """One LoRE of rank M*Q in each expert, always on."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer, *, width_out: int) -> None:
        nn.Module.__init__(self)
        self.rank = moe.lore_rank
        self.a, self.b = _factors(moe.num_experts, self.rank, model.hidden_size, width_out)
        self.fill(moe, init)

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> Decision:
        """Nothing is chosen: the rows of an expert use its LoRE, with pi = 1."""
        return None, None


class StructMoEExperts(GroupedExperts):
    """Entangled LoREs on the up-projection."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        width_out = model.hidden_size if moe.moe_lore_interaction == "standalone" else moe.expert_width(model)
        self.lores = (LoREs if moe.moe_lore_routed else UnroutedLoREs)(model, moe, init, width_out=width_out)
        self.num_lores = self.lores.count if moe.moe_lore_routed else 0

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting | None]:
        """(y_RD, the second routing, in the order of the given rows; None where nothing is routed)."""
        choice, routing = self.lores(x_RD, rows_E)
        return self.compute(x_RD, rows_E, choice), routing

    def compute(self, x_RD: Tensor, rows_E: Tensor, choice: LoreChoice | None) -> Tensor:
        """y_RD."""
        return self.mlp.down(self.mlp.hidden(x_RD, rows_E, self.entangled(), choice), rows_E)

    def entangled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The projections that LoREs are added to, with their factors: equation 2."""
        return {"up": self.lores.matrices()}


class GateEntangledGatedExperts(StructMoEExperts):
    """Gated experts, LoREs on the gate's projection."""

    def entangled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The gate alone."""
        return {"gate": self.lores.matrices()}


class BothEntangledGatedExperts(StructMoEExperts):
    """Gated experts, LoREs on both projections: one choice, two pairs of factors."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__(model, moe, init)
        self.gate_lores = UnchosenLoREs(self.lores, moe, init)

    def entangled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Both projections."""
        return {"up": self.lores.matrices(), "gate": self.gate_lores.matrices()}


class UnchosenLoREs(LoREs):
    """Factors with the shape of other LoREs. The choice of those LoREs is used for them too."""

    def __init__(self, like: LoREs, moe: MoEConfig, init: Initializer) -> None:
        nn.Module.__init__(self)
        self.rank = like.rank
        self.a, self.b = _factors(like.count, like.rank, like.a.shape[1], like.b.shape[1])
        self.fill(moe, init)


class StandaloneExperts(StructMoEExperts):
    """LoREs beside the expert, added to its output."""

    def compute(self, x_RD: Tensor, rows_E: Tensor, choice: LoreChoice | None) -> Tensor:
        """y_RD."""
        added = HiddenLayer(rows_E, "identity", Projection(None, *self.lores.matrices()), choice=choice)
        return self.mlp.down(self.mlp.hidden(x_RD, rows_E), rows_E) + grouped_lore(x_RD, added, backend=self.mlp.hidden_backend)


class LoreGatedExperts(StructMoEExperts):
    """LoREs that multiply the activated hidden layer: act(x W1^T) is the gate."""

    def compute(self, x_RD: Tensor, rows_E: Tensor, choice: LoreChoice | None) -> Tensor:
        """y_RD."""
        layer = HiddenLayer(rows_E, self.mlp.activation, Projection(None, *self.lores.matrices()), self.mlp.up(), choice)
        return self.mlp.down(grouped_lore(x_RD, layer, backend=self.mlp.hidden_backend), rows_E)


def build_structmoe(model: ModelConfig, moe: MoEConfig, init: Initializer) -> StructMoEExperts:
    """The class for the config's interaction and activation."""
    gated = {"up": StructMoEExperts, "gate": GateEntangledGatedExperts, "both": BothEntangledGatedExperts}[moe.moe_lore_projection]
    entangled = gated if model.is_gated else StructMoEExperts
    kinds = {"entangled": entangled, "standalone": StandaloneExperts, "gated": LoreGatedExperts}
    return kinds[moe.moe_lore_interaction](model, moe, init)


def _factors(count: int, rank: int, width_in: int, width_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """(A, B) of `count` LoREs, stacked and empty."""
    return nn.Parameter(torch.empty(count * rank, width_in)), nn.Parameter(torch.empty(count * rank, width_out))
