"""Mixture of experts: the number of experts, the layers that have them, the router, the kind of expert and the losses.
`megatron.config.components` lists the names that can be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config import experts, routers
from megatron.config.components import EXPERTS, LOSSES, ROUTERS, UnknownComponent, check_known
from megatron.config.experts import DecomposedOptions, LoreOptions
from megatron.config.model import ModelConfig
from megatron.config.routers import (
    DocumentPoolOptions,
    ExpertThresholdOptions,
    QuantileBalancingOptions,
    RecurrentOptions,
    SigmoidOptions,
    SMoEDropoutOptions,
    TopKOptions,
    TopPOptions,
)
from megatron.config.section import NaturalInt, PositiveFloat, PositiveInt, Problem
from megatron.config.zero_computation import KEYS as ZERO_COMPUTATION_KEYS
from megatron.config.zero_computation import ZeroComputationOptions

NEED_EXPERTS = (
    "moe_expert_type",
    "moe_expert_segments",
    "moe_expert_bias",
    "moe_use_residual",
    "moe_num_shared_experts",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    *ZERO_COMPUTATION_KEYS,
)
"""Keys that say something of MoE layers, where there must be one."""

TEMPERED_LOSSES = ("block_wise_selection", "neighbour_selection")
"""Losses that `moe_block_wise_temperature` is for."""

MEGABLOCKS_BLOCK = 128
"""MegaBlocks 0.10 takes the logarithm of all experts' columns, in blocks of this many, and fails where there is no whole block."""


class MoEConfig(
    DecomposedOptions,
    LoreOptions,
    SMoEDropoutOptions,
    RecurrentOptions,
    DocumentPoolOptions,
    ExpertThresholdOptions,
    QuantileBalancingOptions,
    TopPOptions,
    SigmoidOptions,
    TopKOptions,
    ZeroComputationOptions,
):
    moe_num_experts_by_layer: list[PositiveInt] | None = None
    """Number of experts in each MoE layer, from the first MoE layer to the last (PR-MoE). None: every MoE layer has `moe_num_experts`."""
    moe_expert_interval: PositiveInt = 1
    """Distance between MoE layers. The first layer after `moe_first_k_dense_layers` has experts, and then every layer at this distance."""
    moe_first_k_dense_layers: NaturalInt = 0
    """The first k layers are dense (first_k_dense_replace in DeepSeek)."""
    moe_layers: list[NaturalInt] | None = None
    """Numbers of the layers that have experts; the first layer is 0. None: `moe_first_k_dense_layers` and `moe_expert_interval` decide."""
    moe_router_type: str = "sinkhorn"
    """Name of the router that chooses experts."""
    moe_expert_type: str = "grouped"
    """Kind of expert. grouped: MLPs. structmoe: MLPs with routed low-rank experts (LoREs) inside. decomposed: MLPs whose matrices are products of
    two low-rank matrices."""
    moe_num_shared_experts: NaturalInt = 0
    """Number of shared experts. Every token uses them in addition to its chosen experts. They are one MLP of this many times the expert width
    (DeepSeekMoE)."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Hidden width of the shared expert. It is used as given, with a gated activation too (Qwen-MoE). None: `moe_num_shared_experts` decides."""
    moe_shared_expert_gate: bool = False
    """Multiply the shared expert's output by sigmoid(x w), where x is the token's hidden state and w is trained (Qwen-MoE)."""
    moe_use_residual: bool = False
    """Residual MoE (DeepSpeed-MoE): each MoE layer also has a dense MLP. A trained softmax gives each token two weights, which mix the MLP's
    output with the experts' output."""
    moe_losses: dict[str, float] = {}
    """Auxiliary losses and their coefficients, for example {load_balance: 0.01, z_loss: 0.001}. A loss that is not named is not computed.
    docs/moe.md defines each loss and converts the coefficients of other programs."""
    moe_block_wise_temperature: PositiveFloat = 1.0
    """Temperature tau of the losses `block_wise_selection` (CoSMoEs, equation 2) and `neighbour_selection`: router logits are multiplied by it."""
    moe_loss_ramp: dict[str, list[float]] = {}
    """Auxiliary losses that start late, and the parts of the training steps between which their coefficients rise. With
    {block_wise_selection: [0.2, 0.6]} the coefficient is 0 in the first 20 % of the steps. Then it rises evenly. From 60 % of the steps on it is the
    number in `moe_losses`."""

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return self.moe_num_experts > 1 or self.moe_num_experts_by_layer is not None

    @property
    def asks_for_documents(self) -> bool:
        """Whether the router looks at which document a token is from."""
        return self.has_experts and self.moe_router_type in routers.NUMBER_DOCUMENTS

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` of the layers, each number that occurs at least once."""
        return [count * self.moe_expert_segments for count in self.moe_num_experts_by_layer or [self.moe_num_experts]]

    @property
    def choice_counts(self) -> list[int]:
        """`num_choices` of the layers, each number that occurs at least once."""
        return [count + self.num_zero_computation for count in self.expert_counts]

    @property
    def dispatcher(self) -> str:
        """Name of the dispatcher. A library may compute dispatch and experts together (`kernel_backends.experts`)."""
        return "local" if self.kernel_backends.get("experts", "auto") in ("auto", "reference") else "library"

    def moe_layer_numbers(self, num_layers: int) -> list[int]:
        """The layers, from 0, that have experts instead of a dense MLP."""
        if not self.has_experts:
            return []
        if self.moe_layers is not None:
            return sorted(self.moe_layers)
        first = self.moe_first_k_dense_layers
        return [layer for layer in range(first, num_layers) if (layer - first) % self.moe_expert_interval == 0]

    def for_layers(self, num_layers: int) -> dict[int, MoEConfig]:
        """Layer -> its section, in which `moe_num_experts` is that layer's own number; layers with a dense MLP are absent."""
        numbers = self.moe_layer_numbers(num_layers)
        counts = self.moe_num_experts_by_layer or [self.moe_num_experts] * len(numbers)
        return {
            layer: self.model_copy(update={"moe_num_experts": count, "moe_num_experts_by_layer": None})
            for layer, count in zip(numbers, counts, strict=True)
        }

    def expert_width(self, model: ModelConfig) -> int:
        """Hidden width F of one expert, after segmentation."""
        whole = self.moe_ffn_hidden_size or model.ffn_hidden_size or model.mlp_size or -(-4 * model.hidden_size // 256) * 256
        return whole // self.moe_expert_segments

    def expert_model(self, model: ModelConfig) -> ModelConfig:
        """The model as its experts see it: `hidden_size` is the width that they read and write (`moe_latent_size`)."""
        if self.moe_latent_size is None:
            return model
        width = self.expert_width(model) * self.moe_expert_segments
        return model.model_copy(update={"hidden_size": self.moe_latent_size, "ffn_hidden_size": width})

    def for_router(self) -> MoEConfig:
        """This layer's section for its router, which chooses among all experts alike, those without a matrix product included."""
        if not self.num_zero_computation:
            return self
        return self.model_copy(update={"moe_num_experts": self.num_choices, "moe_expert_segments": 1, "moe_top_k": self.top_k})

    def shared_width(self, model: ModelConfig) -> int:
        """Hidden width of the shared expert; 0 where there is none."""
        return self.moe_shared_expert_intermediate_size or self.moe_num_shared_experts * self.expert_width(model)

    def idle_keys(self) -> Iterator[tuple[str, str]]:
        """(key, what to say of it) for keys that were given and do not do what they seem to, beside the chosen components and numbers.

        A component from outside may read them all.
        """
        if not self.has_experts:
            for key in sorted(key for key in self.model_fields_set if key.startswith("moe_") and getattr(self, key) != _default(key)):
                yield key, "has no effect: moe_num_experts is 1, so every layer is dense"
            return
        for choice, options in (("moe_router_type", routers.OPTIONS), ("moe_expert_type", experts.OPTIONS)):
            chosen = getattr(self, choice)
            known = {key for section in options.values() for key in section.model_fields}
            for key in sorted(self.model_fields_set & known - set(options[chosen].model_fields)) if chosen in options else ():
                readers = " and ".join(name for name, section in options.items() if key in section.model_fields)
                yield key, f"has no effect with {choice} {chosen}; it is for {readers}"
        if self.moe_expert_type == "structmoe" and not self.moe_lore_routed:
            for key in sorted(self.model_fields_set & {"moe_lore_top_k", "moe_lore_normalize"}):
                yield key, "has no effect with moe_lore_routed: false, because then no router chooses LoREs"
        if "moe_block_wise_temperature" in self.model_fields_set and self.moe_losses.keys().isdisjoint(TEMPERED_LOSSES):
            yield "moe_block_wise_temperature", f"has no effect, because moe_losses does not name {' or '.join(TEMPERED_LOSSES)}"
        if "moe_zero_computation_balance" in self.model_fields_set and "heterogeneous_load_balance" not in self.moe_losses:
            yield "moe_zero_computation_balance", "has no effect, because moe_losses does not name heterogeneous_load_balance"
        if self.moe_router_type == "top_p" and "moe_top_k" in self.model_fields_set:
            yield "moe_top_k", "has no effect with moe_router_type top_p; this router chooses the number of experts itself"
        yield from self._weights_of_one()

    def _weights_of_one(self) -> Iterator[tuple[str, str]]:
        """Settings that leave a router nothing to learn from: the one weight of a token divided by itself."""
        if self.top_k == 1 and self.moe_router_type in ("topk", "sigmoid", "quantile_balancing", "document_pool", "recurrent"):
            says = "makes the weight of every chosen expert 1 when moe_top_k is 1; the router then learns from moe_losses only"
            if self.moe_normalize_top_k:
                yield "moe_normalize_top_k", says
            elif self.moe_router_type == "topk" and not self.moe_router_pre_softmax:
                yield "moe_router_pre_softmax", says
        if self.moe_expert_type == "structmoe" and self.moe_lore_routed and self.moe_lore_normalize and self.moe_lore_top_k == 1:
            yield (
                "moe_lore_normalize",
                "makes the weight of every chosen LoRE 1 when moe_lore_top_k is 1; the LoRE routers then learn from lore_balance only",
            )

    def check(self) -> Iterator[Problem]:
        for options in (LoreOptions, DecomposedOptions, SigmoidOptions, SMoEDropoutOptions, ZeroComputationOptions):
            yield from options.check(self)
        yield from self._count_problems()
        yield from self._placement_problems()
        yield from self._component_problems()
        yield from self._library_problems()
        if self.moe_shared_expert_gate and not (self.moe_num_shared_experts or self.moe_shared_expert_intermediate_size):
            yield Problem(("moe_shared_expert_gate",), "needs a shared expert; give moe_num_shared_experts or moe_shared_expert_intermediate_size")
        if self.moe_num_shared_experts and self.moe_shared_expert_intermediate_size:
            keys = ("moe_shared_expert_intermediate_size", "moe_num_shared_experts")
            yield Problem(keys, "give either it or moe_num_shared_experts, not both")

    def check_with(self, model: ModelConfig) -> Iterator[Problem]:
        """The rules that need the model's sizes too."""
        if self.has_experts:
            yield from self._layer_problems(model.num_layers)
            yield from self._width_problems(model)

    def _count_problems(self) -> Iterator[Problem]:
        counts = self.moe_num_experts_by_layer
        if counts is None:
            if self.moe_top_k > self.moe_num_experts:
                yield Problem(("moe_top_k", "moe_num_experts"), f"must be at most moe_num_experts ({self.moe_num_experts})")
            return
        if self.moe_num_experts > 1:
            yield Problem(("moe_num_experts_by_layer", "moe_num_experts"), "give either it or moe_num_experts, not both")
        if min(counts, default=1) < 2:
            yield Problem(
                ("moe_num_experts_by_layer",), "must be a list of numbers, each 2 or more; write moe_layers to say which layers have experts"
            )
        elif self.moe_top_k > min(counts):
            yield Problem(("moe_top_k", "moe_num_experts_by_layer"), f"must be at most the smallest number of experts ({min(counts)})")

    def _placement_problems(self) -> Iterator[Problem]:
        if self.moe_layers is None:
            return
        if len(set(self.moe_layers)) < len(self.moe_layers) or not self.moe_layers:
            yield Problem(("moe_layers",), "must name at least one layer, and no layer twice")
        for key in ("moe_first_k_dense_layers", "moe_expert_interval"):
            if key in self.model_fields_set and getattr(self, key) != _default(key):
                yield Problem(("moe_layers", key), f"says which layers have experts; remove {key}")

    def _component_problems(self) -> Iterator[Problem]:
        yield from _unknown_name("moe_router_type", ROUTERS, self.moe_router_type)
        yield from _unknown_name("moe_expert_type", EXPERTS, self.moe_expert_type)
        if not self.has_experts:
            for key in NEED_EXPERTS:
                if getattr(self, key) != _default(key):
                    yield Problem((key, "moe_num_experts"), "needs moe_num_experts of 2 or more; with 1 every layer is dense")
        for name, coefficient in self.moe_losses.items():
            yield from _unknown_name(f"moe_losses.{name}", LOSSES, name)
            if coefficient < 0:
                yield Problem((f"moe_losses.{name}",), "must be 0 or more")
        if "joint_load_balance" in self.moe_losses and len(set(self.expert_counts)) > 1:
            yield Problem(("moe_losses.joint_load_balance", "moe_num_experts_by_layer"), "needs the same number of experts in all layers")
        if self.has_experts and self.moe_router_type == "quantile_balancing":
            yield from self.choice_problems()
        if self.has_experts and self.moe_router_type == "document_pool":
            yield from self.pool_problems()
        yield from self._ramp_problems()
        if "lore_balance" in self.moe_losses and not (self.moe_expert_type == "structmoe" and self.moe_lore_routed):
            yield Problem(("moe_losses.lore_balance", "moe_expert_type"), "needs moe_expert_type: structmoe with routed LoREs")

    def _ramp_problems(self) -> Iterator[Problem]:
        for name, parts in self.moe_loss_ramp.items():
            key = f"moe_loss_ramp.{name}"
            if name not in self.moe_losses:
                yield Problem((key, "moe_losses"), "must be a loss that moe_losses names")
            if len(parts) != 2 or not 0 <= parts[0] <= parts[1] <= 1:
                yield Problem(
                    (key,), "must be two numbers from 0 to 1, the smaller one first: where the coefficient starts to rise and where it ends"
                )

    def _library_problems(self) -> Iterator[Problem]:
        """What a library that computes dispatch and experts together cannot do."""
        if self.dispatcher != "library" or not self.has_experts:
            return
        key, instead = "kernel_backends.experts", "remove this entry of kernel_backends"
        if self.moe_expert_type != "grouped":
            yield Problem((key, "moe_expert_type"), f"computes moe_expert_type: grouped only, and it is {self.moe_expert_type}; {instead}")
        if self.moe_expert_bias:
            yield Problem((key, "moe_expert_bias"), f"computes experts without biases only; {instead}, or write moe_expert_bias: false")
        if self.moe_router_type in routers.VARYING:
            says = "needs the same number of experts for every token, and moe_router_type"
            yield Problem((key, "moe_router_type"), f"{says} {self.moe_router_type} chooses it by token; {instead}")
        if self.num_zero_computation:
            named = next(name for name in ZERO_COMPUTATION_KEYS if getattr(self, name))
            yield Problem((key, named), f"needs the same number of experts with weights for every token; {instead}, or remove {named}")

    def _layer_problems(self, num_layers: int) -> Iterator[Problem]:
        numbers = self.moe_layer_numbers(num_layers)
        if self.moe_layers is not None and max(self.moe_layers, default=0) >= num_layers:
            yield Problem(("moe_layers", "num_layers"), f"must name layers from 0 to {num_layers - 1}")
        elif not numbers:
            yield Problem(("moe_first_k_dense_layers", "num_layers"), f"leaves no layer for experts, because the model has {num_layers} layers")
        if self.moe_num_experts_by_layer is not None and len(self.moe_num_experts_by_layer) != len(numbers):
            yield Problem(("moe_num_experts_by_layer",), f"must have one number for each of the {len(numbers)} layers with experts")

    def _width_problems(self, model: ModelConfig) -> Iterator[Problem]:
        if self.moe_latent_size is not None and self.moe_latent_size > model.hidden_size:
            yield Problem(
                ("moe_latent_size", "hidden_size"), f"must be at most hidden_size ({model.hidden_size}); a larger one makes nothing cheaper"
            )
        seen = self.expert_model(model)
        width, whole = self.expert_width(model), self.model_copy(update={"moe_expert_segments": 1}).expert_width(model)
        if whole % self.moe_expert_segments:
            yield Problem(("moe_expert_segments", "moe_ffn_hidden_size", "ffn_hidden_size"), f"must divide the expert width ({whole})")
        if self.dispatcher == "library" and width * min(self.expert_counts) < MEGABLOCKS_BLOCK:
            sizes = f"{min(self.expert_counts)} experts of width {width}"
            yield Problem(("kernel_backends.experts", "moe_ffn_hidden_size"), f"needs {MEGABLOCKS_BLOCK} columns in all experts; {sizes} are fewer")
        if self.moe_expert_type == "structmoe":
            yield from self._lore_rank_problems(seen, width)
            if self.moe_lore_projection != "up" and not model.is_gated:
                yield Problem(("moe_lore_projection", "activation"), f"needs a gated activation such as swiglu; {model.activation} has no gate")
            if self.moe_lore_interaction == "gated" and model.is_gated:
                yield Problem(("moe_lore_interaction", "activation"), f"needs an activation without a gate; {model.activation} has a gate")
        if self.moe_expert_type == "decomposed" and self.decomposition_rank(seen.hidden_size) > max(seen.hidden_size, width):
            yield Problem(
                ("moe_decomposition_rank", "hidden_size"), f"must be at most the larger width of the matrix ({max(seen.hidden_size, width)})"
            )

    def _lore_rank_problems(self, model: ModelConfig, width: int) -> Iterator[Problem]:
        inner = model.hidden_size if self.moe_lore_interaction == "standalone" else width
        allowed = f"must be at most the larger width of the matrix that it adds to ({model.hidden_size} x {inner})"
        if self.lore_rank <= max(model.hidden_size, inner):
            return
        if self.moe_lore_routed:
            yield Problem(("moe_lore_rank", "hidden_size"), allowed)
        else:
            whole = (
                f"times moe_num_lores ({self.moe_num_lores}) is {self.lore_rank}, the rank of the one LoRE in each expert without LoRE routers; it"
            )
            yield Problem(("moe_lore_rank", "moe_num_lores", "hidden_size"), f"{whole} {allowed}")


def _default(key: str) -> Any:
    return MoEConfig.model_fields[key].get_default(call_default_factory=True)


def _unknown_name(key: str, registry: Mapping[str, Any], name: str) -> Iterator[Problem]:
    try:
        check_known(registry, name)
    except UnknownComponent as error:
        yield Problem((key,), str(error))
