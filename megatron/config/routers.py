"""Options of the routers. Each router has a class with its own keys. The moe section inherits from all of them, so that the YAML stays flat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megatron.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section


class RouterOptions(Section):
    """What every router knows."""

    moe_num_experts: PositiveInt = 1
    """Number of experts in each MoE layer. 1: every layer is dense, unless `moe_num_experts_by_layer` is given."""
    moe_top_k: PositiveInt = 1
    """Number of experts for each token. With the routers expert_choice and expert_threshold it is the mean number. The router top_p does not read
    it, because it chooses the number itself."""
    moe_expert_segments: PositiveInt = 1
    """Fine-grained experts (DeepSeekMoE). With m segments, N experts of width F become m*N experts of width F/m, and K experts per token become
    m*K."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer after segmentation; of which layer, where they differ, `MoEConfig.for_layers` says."""
        return self.moe_num_experts * self.moe_expert_segments

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` of the layers, each number that occurs at least once."""
        return [self.num_experts]

    @property
    def choice_counts(self) -> list[int]:
        """Experts that the router of a layer chooses from, each number that occurs at least once."""
        return self.expert_counts

    @property
    def top_k(self) -> int:
        """Experts per token after segmentation."""
        return self.moe_top_k * self.moe_expert_segments


class JitterOptions(RouterOptions):
    """`expert_choice`, and what all routers but sinkhorn know."""

    moe_jitter_eps: Fraction | None = None
    """In training, the router's input is multiplied by a random factor between 1 - eps and 1 + eps. None: no jitter."""


class NormalizeOptions(JitterOptions):
    """For routers whose weights may be divided by their sum."""

    moe_normalize_top_k: bool = False
    """True: the weights of a token's chosen experts are divided by their sum (Mixtral, DeepSeek-V3). False: the weights are the probabilities
    themselves."""


class ScaleOptions(NormalizeOptions):
    """For routers whose weights may be scaled."""

    moe_router_topk_scaling_factor: PositiveFloat = 1.0
    """Routers topk, sigmoid, quantile_balancing, document_pool and recurrent: the weights of the chosen experts are multiplied by this (2.5 in
    DeepSeek-V3)."""


class TopKOptions(ScaleOptions):
    """`topk`: softmax over the experts, the most probable ones chosen."""

    moe_router_pre_softmax: bool = True
    """Router topk. True: softmax over all experts, then the choice. False: the choice first, then softmax over the chosen experts (Mixtral)."""


class SigmoidOptions(ScaleOptions):
    """`sigmoid`: DeepSeek-V3's router."""

    moe_router_bias_update_rate: NonNegativeFloat = 0.001
    """Router sigmoid: at each step, the bias of each expert moves by this amount towards an even load. 0: the router has no bias."""
    moe_router_num_groups: PositiveInt | None = None
    """Router sigmoid: number of groups that the experts are divided into. None: no groups."""
    moe_router_group_topk: PositiveInt | None = None
    """Router sigmoid: number of groups that a token may choose its experts from. None: no groups."""

    def check(self) -> Iterator[Problem]:
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if (groups is None) != (chosen is None):
            given, missing = ("moe_router_num_groups", "moe_router_group_topk")[:: 1 if chosen is None else -1]
            yield Problem((given,), f"needs {missing} too; give both or neither")
        if groups is None or chosen is None:
            return
        counts = self.expert_counts
        left = chosen * (min(counts) // groups)
        if uneven := next((count for count in counts if count % groups), None):
            keys = ("moe_router_num_groups", "moe_num_experts", "moe_num_experts_by_layer")
            yield Problem(keys, f"must divide the number of experts in a layer ({uneven})")
        elif chosen > groups:
            yield Problem(("moe_router_group_topk", "moe_router_num_groups"), f"must be at most moe_router_num_groups ({groups})")
        elif left < self.top_k:
            message = f"must give each token a choice of at least {self.top_k} experts (moe_top_k); {chosen} groups have {left}"
            yield Problem(("moe_router_group_topk", "moe_top_k", "moe_num_experts_by_layer"), message)


class TopPOptions(NormalizeOptions):
    """`top_p`: as many experts as a token needs."""

    moe_router_top_p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Router top_p: the probabilities of a token's chosen experts sum to at least this. 1: all experts are used. The published models use 0.4."""


class QuantileBalancingOptions(ScaleOptions):
    """`quantile_balancing`: Megatron-Core's bias that is computed from the last step."""

    moe_router_quantile_balancing_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Router quantile_balancing: the share of an expert's old bias that stays at each step. 0: the last step alone decides (Megatron-Core's
    default)."""

    def choice_problems(self) -> Iterator[Problem]:
        """The problems if this router is chosen."""
        if self.top_k >= (smallest := min(self.choice_counts)):
            says = f"must be less than the number of experts in a layer ({smallest}): a token that has all experts leaves no choice to balance"
            yield Problem(("moe_top_k", "moe_num_experts", "moe_num_experts_by_layer"), says)


class ExpertThresholdOptions(JitterOptions):
    """`expert_threshold`: every expert takes the tokens above its running threshold."""

    moe_router_threshold_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Router expert_threshold: how slowly the thresholds follow the load. At each step this share of the old threshold stays. A small number
    keeps the load even while the router learns fast, and a large one averages over more tokens."""


class DocumentPoolOptions(ScaleOptions):
    """`document_pool`: EMO's router."""

    moe_min_document_expert_pool: PositiveInt | None = None
    """Router document_pool: the smallest number of experts that all tokens of a document share in training. None: the number of experts of a
    token."""
    moe_max_document_expert_pool: PositiveInt | None = None
    """Router document_pool: the largest number of experts that all tokens of a document share in training. None: all experts."""
    moe_eval_document_expert_pool: PositiveInt | None = None
    """Router document_pool: outside training, the number of experts that a token chooses from. They are those that its document used most so far.
    None: all experts."""

    def document_pools(self, num_experts: int) -> tuple[int, int, int]:
        """(smallest, largest, outside training) of a layer with so many experts."""
        least, most, evaluated = self.moe_min_document_expert_pool, self.moe_max_document_expert_pool, self.moe_eval_document_expert_pool
        return least or self.top_k, most or num_experts, evaluated or num_experts

    def pool_problems(self) -> Iterator[Problem]:
        """The problems if this router is chosen."""
        fewest = min(self.choice_counts)
        for key in ("moe_min_document_expert_pool", "moe_max_document_expert_pool", "moe_eval_document_expert_pool"):
            given = getattr(self, key)
            if given is not None and not self.top_k <= given <= fewest:
                says = f"must be from the number of experts of a token ({self.top_k}) to the number in a layer ({fewest})"
                yield Problem((key, "moe_top_k", "moe_num_experts", "moe_num_experts_by_layer"), says)
        smallest, largest, _ = self.document_pools(fewest)
        if smallest > largest:
            keys = ("moe_min_document_expert_pool", "moe_max_document_expert_pool")
            yield Problem(keys, f"must be at most moe_max_document_expert_pool ({largest})")


class RecurrentOptions(ScaleOptions):
    """`recurrent`: RMoE's router."""

    moe_router_rnn_hidden_size: PositiveInt = 256
    """Router recurrent: width of what a router remembers of a token from layer to layer (256 in the authors' code)."""


class SMoEDropoutOptions(JitterOptions):
    """`smoe_dropout`: a random router that is not trained, and more experts per token as the training goes on."""

    moe_router_start_k: PositiveInt = 1
    """Router smoe_dropout: number of experts for each token at the start of training. It grows evenly to `moe_top_k`."""
    moe_router_growth: list[float] = [0.0, 1.0]
    """Router smoe_dropout: the part of the training steps in which the number of experts grows. [0.0, 0.5]: it has grown to `moe_top_k` after half of
    the steps."""
    moe_router_eval_k: PositiveInt | None = None
    """Router smoe_dropout: number of experts for each token in evaluation, in text generation and in an export. At most `moe_top_k`. None: as many as
    the training had reached, which is `moe_top_k` at its end."""

    def check(self) -> Iterator[Problem]:
        for key in ("moe_router_start_k", "moe_router_eval_k"):
            value = getattr(self, key)
            if key in self.model_fields_set and value is not None and value > self.top_k:
                yield Problem((key, "moe_top_k"), f"must be at most the number of experts at the end of training, moe_top_k ({self.top_k})")
        parts = self.moe_router_growth
        if len(parts) != 2 or not 0 <= parts[0] <= parts[1] <= 1:
            says = "must be two numbers from 0 to 1, the smaller one first: where the number of experts starts to grow and where it has grown"
            yield Problem(("moe_router_growth",), says)


OPTIONS: dict[str, type[RouterOptions]] = {
    "topk": TopKOptions,
    "sinkhorn": RouterOptions,
    "sigmoid": SigmoidOptions,
    "top_p": TopPOptions,
    "expert_choice": JitterOptions,
    "quantile_balancing": QuantileBalancingOptions,
    "expert_threshold": ExpertThresholdOptions,
    "document_pool": DocumentPoolOptions,
    "recurrent": RecurrentOptions,
    "smoe_dropout": SMoEDropoutOptions,
}
"""Router -> the options that it reads."""
NUMBER_DOCUMENTS = ("document_pool",)
"""Routers that look at which document a token is from."""
VARYING = ("top_p", "expert_choice", "expert_threshold", "smoe_dropout")
"""Routers that give tokens different numbers of experts, from none or one to all."""
