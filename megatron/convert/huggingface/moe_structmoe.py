"""Routers, the mixture of experts and its auxiliary losses. Written into exports by StructMoE-NeoX; needs torch and nothing else.

Shapes: B batch; S sequence; T = B*S tokens; D model width; E experts; K experts per token.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_structmoe import StructMoEConfig
from .experts_structmoe import build_experts, build_mlp, combine, exact, exact_dtype, sort_by_group


class Routing(NamedTuple):
    """A router's decision for every token."""

    expert_TK: Tensor
    """E where a place is empty."""
    weight_TK: Tensor
    logit_TE: Tensor
    memory_TP: Tensor | None = None
    """What the router of the next layer with experts gets. None: this router remembers nothing."""


class Decision(NamedTuple):
    """What the losses look at: one layer's routing of one batch."""

    logit_TE: Tensor
    probability_TE: Tensor
    """Divided by their sum where a router's do not sum to 1."""
    chosen_TE: Tensor
    """1 where the token uses the expert."""
    counts_BS: Tensor
    """1 for tokens, 0 for padding."""
    temperature: float
    """Of block-wise selection."""
    eta_E: Tensor
    """What each expert counts in `heterogeneous_load_balance`."""

    def over_tokens(self, value_T: Tensor) -> Tensor:
        """The mean over the tokens that count."""
        counts_T = self.counts_BS.flatten()
        return (value_T * counts_T).sum() / counts_T.sum().clamp(min=1)


class StructMoERouter(nn.Module):
    """The K most probable experts. What the subclasses choose differently is `decide`."""

    padded = False
    """Whether tokens may use fewer than K experts."""
    remembers = False
    """Whether the next layer's router gets what this one saw."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.num_experts, self.top_k = num_experts, config.num_experts_per_tok
        self.normalize, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.jitter, self.temperature = config.router_jitter_noise, config.moe_block_wise_temperature
        self.cheap, self.tau = config.zero_experts + config.copy_experts + config.constant_experts, config.zero_computation_balance

    def forward(self, x_TD: Tensor, memory_TP: Tensor | None = None) -> Routing:
        """The routing of each token. `memory_TP`: what the router of the layer below remembers, for routers that use it."""
        if self.training and self.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        with exact(x_TD):
            seen_TD = self.seen(x_TD.to(exact_dtype(x_TD)), memory_TP)
            logit_TE = F.linear(seen_TD, self.weight.to(seen_TD.dtype))
            return Routing(*self.decide(logit_TE), logit_TE, seen_TD if self.remembers else None)

    def seen(self, x_TD: Tensor, memory_TP: Tensor | None) -> Tensor:
        """What the logits are computed from."""
        return x_TD

    def probability(self, logit_TE: Tensor) -> Tensor:
        """probability_TE: a softmax over all experts."""
        return logit_TE.softmax(-1)

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK): the probabilities of the chosen ones."""
        weight_TK, expert_TK = self.probability(logit_TE).topk(self.top_k, dim=-1)
        return expert_TK, self.scale * self.normalized(weight_TK)

    def normalized(self, weight_TK: Tensor) -> Tensor:
        """The weights, divided by their sum where the config says so."""
        smallest = torch.finfo(weight_TK.dtype).tiny  # sigmoids of logits below -100 vanish
        return weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=smallest) if self.normalize else weight_TK

    def decision(self, logit_TE: Tensor, counts_BS: Tensor) -> Decision:
        """What the auxiliary losses look at; `counts_BS` is 0 for padding."""
        probability_TE = self.probability(logit_TE)
        expert_TK, _ = self.decide(logit_TE.detach())
        chosen_TE = F.one_hot(expert_TK, self.num_experts + 1).sum(1)[:, : self.num_experts].to(probability_TE.dtype)
        smallest = torch.finfo(probability_TE.dtype).tiny
        shares_TE = probability_TE / probability_TE.sum(-1, keepdim=True).clamp(min=smallest)
        eta_E = torch.where(torch.arange(self.num_experts, device=logit_TE.device) < self.num_experts - self.cheap, 1.0, self.tau)
        return Decision(logit_TE, shares_TE, chosen_TE, counts_BS, self.temperature, eta_E.to(shares_TE))


class SinkhornRouter(StructMoERouter):
    """Sigmoid for K = 1, softmax else. (The balancing of the choice belongs to pre-training and is left out here.)"""

    def probability(self, logit_TE: Tensor) -> Tensor:
        """probability_TE."""
        return logit_TE.sigmoid() if self.top_k == 1 else logit_TE.softmax(-1)


class SigmoidRouter(StructMoERouter):
    """DeepSeek-V3's: a bias steers the choice, which may be limited to the best groups of experts. (Its updates belong to pre-training.)"""

    e_score_correction_bias: Tensor

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.groups, self.chosen_groups = config.n_group or 1, config.topk_group or 1

    def probability(self, logit_TE: Tensor) -> Tensor:
        """score_TE, which need not sum to 1."""
        return logit_TE.sigmoid()

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK)."""
        score_TE = self.probability(logit_TE)
        preference_TE = score_TE.detach() + self.e_score_correction_bias.to(score_TE.dtype)
        if self.groups > 1:
            preference_TE = self.within_best_groups(preference_TE)
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        return expert_TK, self.scale * self.normalized(score_TE.gather(1, expert_TK))

    def within_best_groups(self, preference_TE: Tensor) -> Tensor:
        """Minus infinity outside the groups whose two best experts are preferred most."""
        preference_TGe = preference_TE.unflatten(-1, (self.groups, -1))
        group_TG = preference_TGe.topk(min(2, preference_TGe.shape[-1]), dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, group_TG.topk(self.chosen_groups, dim=-1).indices, True)
        return preference_TGe.masked_fill(~chosen_TG[:, :, None], -torch.inf).flatten(1)


class TopPRouter(StructMoERouter):
    """The fewest experts whose probabilities sum to at least p (Huang et al., 2024); K = E places."""

    padded = True

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.threshold = config.router_top_p

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK)."""
        weight_TK, expert_TK = self.probability(logit_TE).sort(dim=-1, descending=True, stable=True)
        unused_TK = weight_TK.detach().cumsum(-1) - weight_TK.detach() >= self.threshold
        return expert_TK.masked_fill(unused_TK, self.num_experts), self.normalized(weight_TK.masked_fill(unused_TK, 0.0))


class ExpertChoiceRouter(StructMoERouter):
    """Every expert takes its best tokens of the whole batch (Zhou et al., 2022); K = E places.

    What a token gets depends on the tokens around it, later ones and other texts included: generation with a cache sees other choices than one
    forward over the finished text.
    """

    padded = True

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK)."""
        probability_TE = self.probability(logit_TE)
        tokens = len(logit_TE)
        capacity = min(tokens, max(1, round(tokens * self.top_k / self.num_experts)))
        token_CE = probability_TE.detach().topk(capacity, dim=0).indices
        chosen_TE = torch.zeros_like(probability_TE, dtype=torch.bool).scatter_(0, token_CE, True)
        expert_E = torch.arange(self.num_experts, device=logit_TE.device)
        return torch.where(chosen_TE, expert_E, self.num_experts), probability_TE * chosen_TE


class QuantileBalancingRouter(StructMoERouter):
    """Megatron-Core's quantile balancing: a bias on the logits steers the choice. (Its updates belong to pre-training.)"""

    e_score_correction_bias: Tensor

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK)."""
        preference_TE = logit_TE.detach() + self.e_score_correction_bias.to(logit_TE.dtype)
        expert_TK = preference_TE.topk(self.top_k, dim=-1).indices
        return expert_TK, self.scale * self.normalized(self.probability(logit_TE).gather(1, expert_TK))


class ExpertThresholdRouter(StructMoERouter):
    """Every expert takes the tokens whose score exceeds its threshold (arXiv 2603.11535); K = E places. (Thresholds move in pre-training only.)"""

    padded = True
    e_score_threshold: Tensor
    threshold_steps: Tensor

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.register_buffer("e_score_threshold", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("threshold_steps", torch.zeros(1, dtype=torch.float32))

    def probability(self, logit_TE: Tensor) -> Tensor:
        """score_TE, which need not sum to 1."""
        return logit_TE.sigmoid()

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK). Without a step of training there is no threshold, and a token takes its best experts."""
        best_TK = logit_TE.detach().topk(self.top_k, dim=-1).indices
        best_TE = torch.zeros_like(logit_TE, dtype=torch.bool).scatter_(1, best_TK, True)
        chosen_TE = torch.where(self.threshold_steps > 0, logit_TE > self.e_score_threshold.to(logit_TE.dtype), best_TE)
        expert_E = torch.arange(self.num_experts, device=logit_TE.device)
        return torch.where(chosen_TE, expert_E, self.num_experts), self.probability(logit_TE) * chosen_TE


CELL_BIASES = ("input_bias", "memory_bias")


class RouterCell(nn.Module):
    """The gated recurrent unit of the recurrent routers (the equations of torch.nn.GRUCell). `start`: the memory before the first layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(3 * width, width))
        self.memory_weight = nn.Parameter(torch.empty(3 * width, width))
        self.input_bias = nn.Parameter(torch.empty(3 * width))
        self.memory_bias = nn.Parameter(torch.empty(3 * width))
        self.start = nn.Parameter(torch.empty(1, width))

    def forward(self, x_TP: Tensor, memory_TP: Tensor | None) -> Tensor:
        """The memory after this layer."""
        own = [weight.to(x_TP.device, x_TP.dtype) for weight in (self.input_weight, self.input_bias, self.memory_weight, self.memory_bias)]
        before_TP = (self.start if memory_TP is None else memory_TP).to(x_TP.device, x_TP.dtype).expand_as(x_TP)
        given, kept = F.linear(x_TP, *own[:2]).chunk(3, dim=-1), F.linear(before_TP, *own[2:]).chunk(3, dim=-1)
        reset_TP, update_TP = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
        return (1 - update_TP) * (given[2] + reset_TP * kept[2]).tanh() + update_TP * before_TP


class RecurrentRouter(StructMoERouter):
    """RMoE's (Qiu et al., 2024): the logits come from a memory that goes from layer to layer through one GRU."""

    remembers = True

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, config.router_rnn_hidden_size))
        self.into = nn.Linear(config.hidden_size, config.router_rnn_hidden_size, bias=False)
        self.cell = RouterCell(config.router_rnn_hidden_size)
        self.shared = (self.cell,)  # in a tuple: a module that is an attribute would be a part of this one too

    def follow(self, first: RecurrentRouter) -> None:
        """From now on this router uses the GRU of the first layer with experts, which alone keeps it."""
        self.shared = (first.cell,)
        del self.cell

    def seen(self, x_TD: Tensor, memory_TP: Tensor | None) -> Tensor:
        """The memory after this layer."""
        return self.shared[0](F.linear(x_TD, self.into.weight.to(x_TD.dtype)), memory_TP)


class SMoEDropoutRouter(StructMoERouter):
    """A random router that is not trained (Chen et al., 2023); K places, of which as many are used as `experts_per_token` says."""

    padded = True
    experts_per_token: Tensor

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__(config, num_experts)
        shape = self.weight.shape
        del self.weight
        self.register_buffer("weight", torch.empty(shape))
        self.register_buffer("experts_per_token", torch.tensor(config.num_experts_per_tok))
        self.in_evaluation = config.num_experts_in_evaluation

    def decide(self, logit_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_TK, weight_TK): a softmax over the chosen ones."""
        chosen_TK, expert_TK = logit_TE.topk(self.top_k, dim=-1)
        used = self.experts_per_token if self.training or self.in_evaluation is None else self.in_evaluation
        unused_K = torch.arange(self.top_k, device=logit_TE.device) >= used
        return expert_TK.masked_fill(unused_K, self.num_experts), chosen_TK.masked_fill(unused_K, -torch.inf).softmax(-1)


ROUTERS: dict[str, type[StructMoERouter]] = {
    "topk": StructMoERouter,
    "sinkhorn": SinkhornRouter,
    "sigmoid": SigmoidRouter,
    "top_p": TopPRouter,
    "expert_choice": ExpertChoiceRouter,
    "quantile_balancing": QuantileBalancingRouter,
    "expert_threshold": ExpertThresholdRouter,
    "document_pool": StructMoERouter,  # the pools of documents belong to pre-training
    "recurrent": RecurrentRouter,
    "smoe_dropout": SMoEDropoutRouter,
}


# ---------------------------------------------------------------- beside the experts


class ExactLinear(nn.Linear):
    """A linear layer in the number format of routers."""

    def forward(self, x: Tensor) -> Tensor:
        """In float32 (float64 for float64)."""
        dtype = exact_dtype(x)
        with exact(x):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class SharedExpert(nn.Module):
    """y + mlp(x): an expert that every token uses."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__()
        self.mlp = build_mlp(config, config.shared_expert_intermediate_size)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The layer's output."""
        return y_TD + self.mlp(x_TD)


class GatedSharedExpert(SharedExpert):
    """y + sigmoid(x w) * mlp(x) (Qwen1.5-MoE)."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__(config)
        self.gate = ExactLinear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The layer's output."""
        return y_TD + self.gate(x_TD).sigmoid().to(x_TD.dtype) * self.mlp(x_TD)


class ResidualMLP(nn.Module):
    """c1 * y + c2 * mlp(x) with (c1, c2) = softmax(x W + b) (DeepSpeed-MoE)."""

    def __init__(self, config: StructMoEConfig) -> None:
        super().__init__()
        self.mlp = build_mlp(config, config.intermediate_size)
        self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """The layer's output."""
        experts_T, dense_T = self.coefficient(x_TD).softmax(-1, dtype=exact_dtype(x_TD)).to(x_TD.dtype).unbind(-1)
        return experts_T[:, None] * y_TD + dense_T[:, None] * self.mlp(x_TD)


# ---------------------------------------------------------------- around the experts


class LatentProjection(nn.Module):
    """Makes the hidden state narrower for all experts of a layer, and the sum of their results wide again."""

    def __init__(self, config: StructMoEConfig, latent_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, latent_size, bias=False)
        self.up = nn.Linear(latent_size, config.hidden_size, bias=False)


class ZeroComputation(nn.Module):
    """Zero, copy and constant experts, which need no matrix product (MoE++: Jin et al., 2024). Their numbers follow those of the others."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.constants = num_experts, config.constant_experts
        self.count = config.zero_experts + config.copy_experts + config.constant_experts
        self.first_copy = num_experts + config.zero_experts
        if self.constants:
            self.mixture = ExactLinear(config.hidden_size, 2 * self.constants, bias=False)
            self.vector = nn.Parameter(torch.empty(self.constants, config.hidden_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What these experts give, times the router's weights."""
        table_TC = routing.weight_TK.new_zeros(len(x_TD), self.num_experts + self.count + 1)
        weight_TC = table_TC.scatter_add(1, routing.expert_TK, routing.weight_TK)[:, self.first_copy : self.num_experts + self.count]
        if not self.constants:
            return weight_TC.sum(1, keepdim=True).to(x_TD.dtype) * x_TD
        share_TJ2 = self.mixture(x_TD).unflatten(1, (-1, 2)).softmax(-1) * weight_TC[:, -self.constants :, None]
        own_T = weight_TC[:, : -self.constants].sum(1) + share_TJ2[:, :, 0].sum(1)
        return own_T[:, None].to(x_TD.dtype) * x_TD + share_TJ2[:, :, 1].to(x_TD.dtype) @ self.vector.to(x_TD.dtype)


class StructMoESparseMoeBlock(nn.Module):
    """A mixture of experts: route, sort, compute, combine."""

    def __init__(self, config: StructMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts, inner = num_experts, config
        choices = num_experts + config.zero_experts + config.copy_experts + config.constant_experts
        self.gate = ROUTERS[config.router_type](config, choices)
        self.latent = None if config.latent_size is None else LatentProjection(config, config.latent_size)
        self.zero_computation = ZeroComputation(config, num_experts) if choices > num_experts else None
        if config.latent_size is not None:
            inner = copy.copy(config)
            inner.hidden_size = config.latent_size
        self.experts = build_experts(inner, num_experts)
        self.beside = nn.ModuleDict()
        if config.shared_expert_intermediate_size:
            self.beside["shared_expert"] = (GatedSharedExpert if config.shared_expert_gate else SharedExpert)(config)
        if config.residual_mlp:
            self.beside["residual_mlp"] = ResidualMLP(config)

    def forward(self, x_BSD: Tensor, memory_TP: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(y_BSD, logit_TE, what the router of the next layer with experts gets)."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.gate(x_TD, memory_TP)
        z_TZ = x_TD if self.latent is None else self.latent.down(x_TD)
        expert_TK, weight_TK, padded = routing.expert_TK, routing.weight_TK, self.gate.padded
        if self.zero_computation is not None:
            padded, weight_TK = True, weight_TK.masked_fill(expert_TK >= self.num_experts, 0.0)
            expert_TK = expert_TK.clamp(max=self.num_experts)
        order = sort_by_group(expert_TK, self.num_experts, padded=padded)
        y_TD = combine(self.experts(z_TZ.index_select(0, order.source_R), order.ends_G), order, weight_TK)
        if self.latent is not None:
            y_TD = self.latent.up(y_TD)
        if self.zero_computation is not None:
            y_TD = y_TD + self.zero_computation(x_TD, routing)
        for part in self.beside.values():
            y_TD = part(x_TD, y_TD)
        return y_TD.view(x_BSD.shape), routing.logit_TE, routing.memory_TP
