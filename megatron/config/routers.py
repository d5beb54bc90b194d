"""Options of the routers: one class a router, mixed into the moe section, so that the YAML stays flat and a router sees its own keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megatron.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section


class RouterOptions(Section):
    """What every router knows."""

    moe_num_experts: PositiveInt = 1
    """Experts in each MoE layer; 1 means that every layer is dense, unless `moe_num_experts_by_layer` is given."""
    moe_top_k: PositiveInt = 1
    """Experts that each token is sent to; with expert_choice the mean number; top_p chooses the number by itself."""
    moe_expert_segments: PositiveInt = 1
    """Fine-grained experts (DeepSeekMoE): m turns N experts of width F, K per token, into m*N of F/m, m*K per token."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer after segmentation; of which layer, where they differ, `MoEConfig.for_layers` says."""
        return self.moe_num_experts * self.moe_expert_segments

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` of the layers, each number that occurs at least once."""
        return [self.num_experts]

    @property
    def top_k(self) -> int:
        """Experts per token after segmentation."""
        return self.moe_top_k * self.moe_expert_segments


class JitterOptions(RouterOptions):
    """`expert_choice`, and what all routers but sinkhorn know."""

    moe_jitter_eps: Fraction | None = None
    """In training the router's input is multiplied by a random factor from 1 - eps to 1 + eps. None: no jitter."""


class NormalizeOptions(JitterOptions):
    """For routers whose weights may be divided by their sum."""

    moe_normalize_top_k: bool = False
    """Divide the weights of a token's chosen experts by their sum (Mixtral, DeepSeek-V3); otherwise they are the plain probabilities."""


class ScaleOptions(NormalizeOptions):
    """For routers whose weights may be scaled."""

    moe_router_topk_scaling_factor: PositiveFloat = 1.0
    """topk, sigmoid: the weights of the chosen experts are multiplied by this (2.5 in DeepSeek-V3)."""


class TopKOptions(ScaleOptions):
    """`topk`: softmax over the experts, the most probable ones chosen."""

    moe_router_pre_softmax: bool = True
    """topk: softmax over all experts before the choice; false: over the chosen experts alone, after it (Mixtral)."""


class SigmoidOptions(ScaleOptions):
    """`sigmoid`: DeepSeek-V3's router."""

    moe_router_bias_update_rate: NonNegativeFloat = 0.001
    """sigmoid: what a step moves each expert's bias by, towards an even load; 0 switches the bias off."""
    moe_router_num_groups: PositiveInt | None = None
    """sigmoid: groups that the experts are divided into. None: no groups."""
    moe_router_group_topk: PositiveInt | None = None
    """sigmoid: groups that a token may choose its experts from. None: no groups."""

    def check(self) -> Iterator[Problem]:
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if (groups is None) != (chosen is None):
            given, missing = ("moe_router_num_groups", "moe_router_group_topk")[:: 1 if chosen is None else -1]
            yield Problem((given,), f"goes together with {missing}; give both or neither")
        if groups is None or chosen is None:
            return
        counts = self.expert_counts
        left = chosen * (min(counts) // groups)
        if uneven := next((count for count in counts if count % groups), None):
            keys = ("moe_router_num_groups", "moe_num_experts", "moe_num_experts_by_layer")
            yield Problem(keys, f"must divide the number of experts ({uneven})")
        elif chosen > groups:
            yield Problem(("moe_router_group_topk", "moe_router_num_groups"), f"must be at most moe_router_num_groups ({groups})")
        elif left < self.top_k:
            message = f"must leave a token at least its {self.top_k} experts; {chosen} groups have {left}"
            yield Problem(("moe_router_group_topk", "moe_top_k", "moe_num_experts_by_layer"), message)


class TopPOptions(NormalizeOptions):
    """`top_p`: as many experts as a token needs."""

    moe_router_top_p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """top_p: the chosen experts' probabilities sum to at least this; 1 uses all experts. The published models use 0.4."""


OPTIONS: dict[str, type[RouterOptions]] = {
    "topk": TopKOptions,
    "sinkhorn": RouterOptions,
    "sigmoid": SigmoidOptions,
    "top_p": TopPOptions,
    "expert_choice": JitterOptions,
}
"""Router -> the options that it reads."""
