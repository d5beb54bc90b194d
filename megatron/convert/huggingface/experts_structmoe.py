"""MLPs and experts of `StructMoEForCausalLM`. Written into exports by StructMoE-NeoX; needs torch and nothing else.

Shapes: T tokens; D model width; E experts; K experts per token; F expert width; R routed rows, sorted by expert; r rank of a decomposed matrix;
M LoREs per expert; L LoREs per row; Q LoRE rank; N = R*L rows, sorted by LoRE; G groups of rows: experts, or LoREs of all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_structmoe import StructMoEConfig


def identity(x: Tensor) -> Tensor:
    """The gate of a bilinear unit."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "mish": F.mish,
    "silu": F.silu,
    # Of the gate: hidden = act(gate) * up.
    "geglu": F.gelu,
    "reglu": F.relu,
    "swiglu": F.silu,
    "glu": torch.sigmoid,
    "bilinear": identity,
}


class StructMoEMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: StructMoEConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.down_proj(self.activation(self.up_proj(x)))


class StructMoEGatedMLP(StructMoEMLP):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: StructMoEConfig, width: int) -> None:
        super().__init__(config, width)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def build_mlp(config: StructMoEConfig, width: int) -> StructMoEMLP:
    """A dense MLP of this hidden width."""
    return (StructMoEGatedMLP if config.is_gated else StructMoEMLP)(config, width)


# ---------------------------------------------------------------- rows in groups


class Order(NamedTuple):
    """Choices sorted by their group."""

    source_R: Tensor
    """The token of each row."""
    place_TK: Tensor
    """The row of each choice; R for an empty one."""
    ends_G: Tensor
    """int32: where each group's rows end."""


def sort_by_group(group_TK: Tensor, groups: int, *, padded: bool = False) -> Order:
    """Rows in the order of their groups. With `padded`, group number `groups` marks an empty choice, which gets no row."""
    flat = group_TK.reshape(-1)
    sorted_group, order = flat.sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends_G = torch.searchsorted(sorted_group, torch.arange(groups, device=order.device), right=True).int()
    if padded:
        rows = int(ends_G[-1])
        order, place = order[:rows], place.clamp(max=rows)
    return Order(order // group_TK.shape[1], place.view(group_TK.shape), ends_G)


def combine(rows_RD: Tensor, order: Order, weight_TK: Tensor) -> Tensor:
    """y_TD: the rows of each token, weighted and summed."""
    if len(rows_RD) < order.place_TK.numel():  # the row that empty choices point at
        rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
    rows_TKD = rows_RD.index_select(0, order.place_TK.flatten()).unflatten(0, order.place_TK.shape)
    return (rows_TKD * weight_TK.to(rows_RD.dtype)[:, :, None]).sum(1)


def grouped_mm(x_RI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """y_RO: each row times the matrix of its group. One kernel where it takes these sizes and number format, else a loop over groups."""
    device = x_RI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_GIO.dtype
    x_RI, weight_GIO = x_RI.to(dtype), weight_GIO.to(dtype)
    if fits_grouped_mm(weight_GIO):
        return F.grouped_mm(x_RI, weight_GIO, offs=ends_G)
    rows = ends_G.diff(prepend=ends_G.new_zeros(1)).tolist()
    return torch.cat([x @ weight for x, weight in zip(x_RI.split(rows), weight_GIO.unbind(), strict=True)])


def fits_grouped_mm(weight_GIO: Tensor) -> bool:
    """PyTorch's kernel wants rows and columns of multiples of 16 bytes, and no float64."""
    aligned = all(width * weight_GIO.element_size() % 16 == 0 for width in weight_GIO.shape[1:])
    return aligned and weight_GIO.dtype in (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """y_RO, the weights stored as linear layers have them."""
    return grouped_mm(x_RI, weight_GOI.mT, ends_G)


def exact(x: Tensor) -> torch.autocast:
    """A context without automatic casts: routers compute in float32 (float64 for float64) whatever the rest does."""
    return torch.autocast(x.device.type, enabled=False)


def exact_dtype(x: Tensor) -> torch.dtype:
    """The number format of routers."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------- experts


EXPERT_BIASES = ("b1", "b2", "b3")
"""Of up-projection, down-projection and gate."""


class BiasedExperts(nn.Module):
    """What experts with biases add to the rows of each projection; without `expert_bias` nothing (None)."""

    b1: nn.Parameter | None
    b2: nn.Parameter | None
    b3: nn.Parameter | None

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__()
        into, out = (num_experts, config.moe_intermediate_size), (num_experts, config.hidden_size)
        for name, shape in zip(EXPERT_BIASES, (into, out, into), strict=True):
            present = config.expert_bias and (name != "b3" or config.is_gated)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if present else None)

    def biased(self, y_RN: Tensor, bias_EN: Tensor | None, ends_E: Tensor) -> Tensor:
        """y plus the bias of each row's expert."""
        if bias_EN is None:
            return y_RN
        rows_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        return y_RN + bias_EN.to(y_RN.dtype).repeat_interleave(rows_E, dim=0, output_size=y_RN.shape[0])


class StructMoEExperts(BiasedExperts):
    """E MLPs: act(x W1^T) W2."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.shape = (num_experts, config.moe_intermediate_size, config.hidden_size)
        self.w1 = nn.Parameter(torch.empty(self.shape))
        self.w2 = nn.Parameter(torch.empty(self.shape))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """y_RD; the rows are sorted by expert, `ends_E` says where each expert's end."""
        return self.biased(grouped_mm(self.hidden(x_RD, ends_E), self.w2, ends_E), self.b2, ends_E)

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF, activated."""
        return self.activation(self.up(x_RD, ends_E))

    def up(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """x W1^T + b1."""
        return self.biased(grouped_linear(x_RD, self.w1, ends_E), self.b1, ends_E)


class GatedExperts(StructMoEExperts):
    """(act(x W3^T) * x W1^T) W2."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.w3 = nn.Parameter(torch.empty(self.shape))

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF, gated."""
        return self.activation(self.gate(x_RD, ends_E)) * self.up(x_RD, ends_E)

    def gate(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """x W3^T + b3."""
        return self.biased(grouped_linear(x_RD, self.w3, ends_E), self.b3, ends_E)


class DecomposedExperts(BiasedExperts):
    """Every matrix a product of two thin ones (CoSMoEs, equation 1): act(x L1^T R1^T) L2 R2."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.thin = (num_experts, config.decomposition_rank, config.hidden_size)
        self.wide = (num_experts, config.moe_intermediate_size, config.decomposition_rank)
        self.w1_left, self.w1_right = nn.Parameter(torch.empty(self.thin)), nn.Parameter(torch.empty(self.wide))
        self.w2_left, self.w2_right = nn.Parameter(torch.empty(self.wide)), nn.Parameter(torch.empty(self.thin))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """y_RD."""
        y_RD = grouped_mm(grouped_mm(self.hidden(x_RD, ends_E), self.w2_left, ends_E), self.w2_right, ends_E)
        return self.biased(y_RD, self.b2, ends_E)

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF, activated."""
        return self.activation(self.up(x_RD, ends_E))

    def up(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """x L1^T R1^T + b1."""
        return self.biased(grouped_linear(grouped_linear(x_RD, self.w1_left, ends_E), self.w1_right, ends_E), self.b1, ends_E)


class GatedDecomposedExperts(DecomposedExperts):
    """(act(x L3^T R3^T) * x L1^T R1^T) L2 R2."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.w3_left, self.w3_right = nn.Parameter(torch.empty(self.thin)), nn.Parameter(torch.empty(self.wide))

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF, gated."""
        gate_RF = self.biased(grouped_linear(grouped_linear(x_RD, self.w3_left, ends_E), self.w3_right, ends_E), self.b3, ends_E)
        return self.activation(gate_RF) * self.up(x_RD, ends_E)


# ---------------------------------------------------------------- experts with LoREs (StructMoE)


class LoreChoice(NamedTuple):
    """The LoREs of every row."""

    weight_RL: Tensor
    """pi of equation 1."""
    order: Order


class LoREFactors(nn.Module):
    """The low-rank experts A_i B_i of all experts: M of rank Q each, or without routing one of rank M*Q."""

    def __init__(self, config: StructMoEConfig, num_experts: int, width_out: int) -> None:
        super().__init__()
        per_expert, rank = (config.num_lores, config.lore_rank) if config.lore_routed else (1, config.num_lores * config.lore_rank)
        self.a = nn.Parameter(torch.empty(num_experts * per_expert, rank, config.hidden_size))
        self.b = nn.Parameter(torch.empty(num_experts * per_expert, rank, width_out))

    def forward(self, x_RD: Tensor, choice: LoreChoice) -> Tensor:
        """sum over the chosen i of (x pi_i A_i) B_i: what StructMoE's equation 2 adds to x W."""
        x_ND = x_RD.index_select(0, choice.order.source_R)
        y_NF = grouped_mm(grouped_linear(x_ND, self.a, choice.order.ends_G), self.b, choice.order.ends_G)
        return combine(y_NF, choice.order, choice.weight_RL)


class LoreRouter(nn.Module):
    """Every expert's own router over its M LoREs."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, config.num_lores, config.hidden_size))
        self.top_l, self.normalize = config.lore_top_k, config.lore_norm_topk_prob

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> LoreChoice:
        """The L most probable LoREs of each row among those of its expert; all experts' routers are one grouped product."""
        experts, per_expert, _ = self.weight.shape
        dtype = exact_dtype(x_RD)
        with exact(x_RD):
            weight_RL, lore_RL = grouped_linear(x_RD.to(dtype), self.weight.to(dtype), ends_E).softmax(-1).topk(self.top_l, dim=-1)
        if self.normalize:
            weight_RL = weight_RL / weight_RL.sum(-1, keepdim=True)
        expert_R = torch.searchsorted(ends_E, torch.arange(len(x_RD), device=x_RD.device, dtype=torch.int32), right=True)
        return LoreChoice(weight_RL, sort_by_group(lore_RL + per_expert * expert_R[:, None], experts * per_expert))


class NoLoreRouter(nn.Module):
    """Every row has its expert's one LoRE, with pi = 1 (StructMoE, section 4.3)."""

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> LoreChoice:
        """The rows as they lie."""
        row_R = torch.arange(len(x_RD), device=x_RD.device)
        return LoreChoice(x_RD.new_ones(len(x_RD), 1), Order(row_R, row_R[:, None], ends_E))


class LoREs(nn.Module):
    """Low-rank experts and who chooses among them."""

    def __init__(self, config: StructMoEConfig, num_experts: int, width_out: int) -> None:
        super().__init__()
        self.router = LoreRouter(config, num_experts) if config.lore_routed else NoLoreRouter()
        self.factors = LoREFactors(config, num_experts, width_out)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """What they add."""
        return self.factors(x_RD, self.router(x_RD, ends_E))


class EntangledExperts(StructMoEExperts):
    """act(x W1^T + LoREs) W2 (StructMoE, equation 2)."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.lores = LoREs(config, num_experts, config.moe_intermediate_size)

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF."""
        return self.activation(self.up(x_RD, ends_E) + self.lores(x_RD, ends_E))


class UpEntangledGatedExperts(GatedExperts):
    """(act(x W3^T) * (x W1^T + LoREs)) W2."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.lores = LoREs(config, num_experts, config.moe_intermediate_size)

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF."""
        return self.activation(self.gate(x_RD, ends_E)) * (self.up(x_RD, ends_E) + self.lores(x_RD, ends_E))


class GateEntangledGatedExperts(UpEntangledGatedExperts):
    """(act(x W3^T + LoREs) * x W1^T) W2."""

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF."""
        return self.activation(self.gate(x_RD, ends_E) + self.lores(x_RD, ends_E)) * self.up(x_RD, ends_E)


class BothEntangledGatedExperts(UpEntangledGatedExperts):
    """LoREs on both projections: one choice, two pairs of factors."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.gate_lores = LoREFactors(config, num_experts, config.moe_intermediate_size)

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF."""
        choice = self.lores.router(x_RD, ends_E)
        gate_RF = self.gate(x_RD, ends_E) + self.gate_lores(x_RD, choice)
        return self.activation(gate_RF) * (self.up(x_RD, ends_E) + self.lores.factors(x_RD, choice))


class LoreGatedExperts(EntangledExperts):
    """(act(x W1^T) * LoREs) W2."""

    def hidden(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """h_RF."""
        return self.activation(self.up(x_RD, ends_E)) * self.lores(x_RD, ends_E)


class StandaloneExperts(StructMoEExperts):
    """LoREs of the model's width, added to the expert's output (StructMoE, section 4.3)."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.lores = LoREs(config, num_experts, config.hidden_size)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """y_RD."""
        return super().forward(x_RD, ends_E) + self.lores(x_RD, ends_E)


class GatedStandaloneExperts(StandaloneExperts, GatedExperts):
    """The same beside gated experts."""


def build_experts(config: StructMoEConfig, num_experts: int) -> nn.Module:
    """The experts of one layer."""
    gated = config.is_gated
    projection = {"up": UpEntangledGatedExperts, "gate": GateEntangledGatedExperts, "both": BothEntangledGatedExperts}[config.lore_projection]
    with_lores = {
        "entangled": projection if gated else EntangledExperts,
        "standalone": GatedStandaloneExperts if gated else StandaloneExperts,
        "gated": LoreGatedExperts,
    }
    kinds = {
        "grouped": GatedExperts if gated else StructMoEExperts,
        "decomposed": GatedDecomposedExperts if gated else DecomposedExperts,
        "structmoe": with_lores[config.lore_interaction],
    }
    return kinds[config.expert_type](config, num_experts)
