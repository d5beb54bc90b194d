"""The MoE layer: route, dispatch, compute, combine. Losses, counts and statistics are return values.

Shapes: B batch; S sequence; T = B*S tokens; R routed rows; E experts; G LoREs of all experts; D model width; A auxiliary losses; C counts of
scores; Z width that the experts see, D unless `moe_latent_size` is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.config.components import DISPATCHERS, EXPERTS, LOSSES, ROUTERS, resolve_component
from megatron.kernels.route import choice_statistics
from megatron.model.initialization import Initializer
from megatron.model.moe.dispatch.interface import Dispatcher, run_beside
from megatron.model.moe.latent import build_latent
from megatron.model.moe.losses.block_wise_selection import sequences
from megatron.model.moe.losses.entropy import token_entropy
from megatron.model.moe.losses.load_balance import expert_usage
from megatron.model.moe.routing import AuxLoss, Decision, LossContext, Routing
from megatron.model.moe.shared import build_beside
from megatron.model.moe.surroundings import NOTHING_AROUND, Surroundings
from megatron.model.moe.zero_computation import build_zero_computation
from megatron.mpu.collectives import sum_over_data_parallel
from megatron.mpu.regions import WHOLE, Region

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class MoEOutput(NamedTuple):
    """The output of one MoE layer."""

    y_BSD: Tensor
    aux_losses_A: Tensor
    """float32, unweighted, in the order of `moe_losses`."""
    expert_load_E: Tensor
    """int64: tokens sent to each expert."""
    lore_load_G: Tensor
    """int64: tokens sent to each LoRE; G = 0 where there are none."""
    statistics: Tensor
    """float32, detached, in the order of STATISTICS."""
    usage_2E: Tensor | None
    """`expert_usage` summed over the layers up to this one; None where no loss asks for it."""
    scores_C: Tensor | None
    """int64: `Routing.scores_C`, zeros outside training. None: the router does not count scores."""
    decision: Decision
    """What the routers decided for each token."""


STATISTICS = ("router_entropy", "expert_replacement", "experts_per_token", "process_overload", "overload_seconds")
"""Mean entropy of the router's probabilities in nats; the share of experts that the token before did not use (CoSMoEs, equations 4 and 5); mean
number of experts that a token uses; the most rows that an expert-parallel process received over the mean,
and the seconds that this costs for each micro-batch (NaN where nothing is sent)."""


class MoELayer(nn.Module):
    """The feed-forward part of a transformer layer as a mixture of experts; `moe` is the layer's own section (`MoEConfig.for_layers`)."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, init: Initializer) -> None:
        super().__init__()
        self.router = resolve_component(ROUTERS, moe.moe_router_type)(model, moe.for_router(), init)
        self.looks_around = getattr(self.router, "looks_around", False)
        self.scores_width = getattr(self.router, "scores_width", 0)
        """Counts of scores that the router makes in training, C."""
        self.experts = resolve_component(EXPERTS, moe.moe_expert_type)(moe.expert_model(model), moe, init)
        self.beside = build_beside(model, moe, init)
        self.latent = build_latent(model.hidden_size, moe.moe_latent_size, init)
        self.zero_computation = build_zero_computation(model, moe, init)
        self.dispatcher: Dispatcher = resolve_component(DISPATCHERS, moe.dispatcher)(moe)
        self.region: Region = WHOLE
        self.sends = False
        """Whether processes send each other rows of these experts."""
        self.losses: list[AuxLoss] = [resolve_component(LOSSES, name) for name in moe.moe_losses]
        self.wants_usage = "joint_load_balance" in moe.moe_losses
        self.context = LossContext(
            moe.num_choices,
            moe.top_k,
            sum_over_processes=sum_over_data_parallel,
            temperature=moe.moe_block_wise_temperature,
            num_layers=len(moe.moe_layer_numbers(model.num_layers)),
            num_zero_computation=moe.num_zero_computation,
            zero_computation_balance=moe.moe_zero_computation_balance,
        )

    def forward(
        self,
        x_BSD: Tensor,
        earlier_rows_E: Tensor | None = None,
        earlier_usage_2E: Tensor | None = None,
        around: Surroundings = NOTHING_AROUND,
    ) -> MoEOutput:
        """Output, losses, loads, statistics.

        `earlier_rows_E` is the load of the step's earlier micro-batches, for losses over the global batch. `earlier_usage_2E` is the `usage_2E`
        of the MoE layer before this one, for losses over all layers. `around` is for routers that look around.
        """
        x_BSD = self.region.whole(x_BSD)
        x_TD = x_BSD.flatten(0, 1)
        routed = self.router(x_TD, around) if self.looks_around else self.router(x_TD)
        routing = routed._replace(batch_shape=tuple(x_BSD.shape[:2]))
        shared_TD, divided = self.region.copied(x_TD), routing._replace(weight_TK=self.region.copied(routing.weight_TK))
        beside: list[Any] = list(self.beside)
        branches: list[Tensor] = []
        y_TZ, rows_E, lores, overload_2 = run_beside(
            self.dispatcher,
            self.latent.enter(shared_TD),
            self.zero_computation.dispatched(divided),
            self.experts,
            meanwhile=lambda: branches.extend(part.branch(shared_TD) for part in beside),
        )
        y_TD = self.zero_computation.add(self.latent.leave(y_TZ), shared_TD, divided, counts=self.region.group.rank == 0)
        for part, branch in zip(beside, branches, strict=True):
            y_TD = part(shared_TD, y_TD, branch)
        context = self.context._replace(rows_E=rows_E, lores=lores, earlier_rows_E=earlier_rows_E, earlier_usage_2E=earlier_usage_2E)
        lore_load_G = rows_E.new_zeros(0) if lores is None else lores.rows_G
        return MoEOutput(
            self.region.leave(y_TD.view(x_BSD.shape)),
            self._auxiliary_losses(routing, context),
            self.zero_computation.loads(routing, rows_E),
            lore_load_G,
            statistics(routing, context, overload_2),
            self._usage(routing, earlier_usage_2E) if self.wants_usage else None,
            self._scores(routing) if self.scores_width else None,
            Decision(routing, lores, self.context.num_experts),
        )

    def _scores(self, routing: Routing) -> Tensor:
        return routing.expert_TK.new_zeros(self.scores_width) if routing.scores_C is None else routing.scores_C

    def _usage(self, routing: Routing, earlier_2E: Tensor | None) -> Tensor:
        own_2E = expert_usage(routing, self.context.num_experts)
        return own_2E if earlier_2E is None else own_2E + earlier_2E

    def _auxiliary_losses(self, routing: Routing, context: LossContext) -> Tensor:
        if not self.losses:
            return torch.zeros(0, device=routing.logit_TE.device)
        return torch.stack([loss(routing, context).float() for loss in self.losses])


@torch.no_grad()
def statistics(routing: Routing, context: LossContext, overload_2: Tensor | None = None) -> Tensor:
    """float32, in the order of STATISTICS. Nothing is transferred to the host."""
    entropy = token_entropy(routing).mean() if routing.softmax is None else routing.softmax.entropy
    chosen = choice_statistics(routing.expert_TK, context.num_experts, sequences(routing)[1])
    overload_2 = entropy.new_full((2,), torch.nan) if overload_2 is None else overload_2
    return torch.cat([entropy.detach().double()[None], chosen, overload_2.double()]).float()
