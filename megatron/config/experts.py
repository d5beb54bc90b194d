"""Options of the kinds of expert: one class a kind, mixed into the moe section, so that the YAML stays flat and a kind sees its own keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.routers import RouterOptions
from megatron.config.section import PositiveInt, Problem


class ExpertOptions(RouterOptions):
    """What every kind of expert knows."""

    moe_ffn_hidden_size: PositiveInt | None = None
    """Hidden width F of one expert before segmentation (Megatron-LM's key). None: `ffn_hidden_size` or `intermediate_size` as it is, else
    4 * hidden_size rounded up to a multiple of 256 (NeoX)."""
    moe_expert_bias: bool = False
    """Biases on the experts' projections, as `use_bias_in_mlp` gives them to dense MLPs (Megatron's add_bias_linear, for the experts alone)."""
    kernel_backends: dict[str, str] = {}
    """Implementation to use for an operation, e.g. {grouped_gemm: reference}; operations that are not named use the fastest that runs here."""


class LoreOptions(ExpertOptions):
    """`structmoe`: low-rank experts (LoREs) inside every expert."""

    moe_num_lores: PositiveInt = 8
    """StructMoE: low-rank experts (LoREs) inside each expert, M."""
    moe_lore_top_k: PositiveInt = 1
    """StructMoE: LoREs that each token uses, l; at most `moe_num_lores`."""
    moe_lore_rank: PositiveInt = 64
    """StructMoE: rank of one LoRE, Q; at most the larger width of the matrix that it adds to (without LoRE routers M * Q is)."""
    moe_lore_normalize: bool = False
    """StructMoE: divide the weights of the chosen LoREs by their sum."""
    moe_lore_init: Literal["layer", "zero"] = "layer"
    """StructMoE: initial second factor of a LoRE: like the layer's own weights, or zero (the LoRE starts without effect)."""
    moe_lore_routed: bool = True
    """StructMoE: false is the paper's ablation without LoRE routers: one LoRE of rank M * Q in each expert, always on."""
    moe_lore_interaction: Literal["entangled", "standalone", "gated"] = "entangled"
    """StructMoE: what LoREs add to. entangled: the up-projection, before the activation (equation 2); standalone: the expert's output (the paper's
    ablation); gated: they multiply the activated hidden layer."""
    moe_lore_projection: Literal["up", "gate", "both"] = "up"
    """StructMoE with a gated activation: the projection that entangled LoREs add to; `both` has LoREs for each, chosen together."""

    @property
    def lore_rank(self) -> int:
        """Rank of a LoRE as it is built: without LoRE routers there is one of all ranks together."""
        return self.moe_lore_rank * (1 if self.moe_lore_routed else self.moe_num_lores)

    def check(self) -> Iterator[Problem]:
        if self.moe_lore_top_k > self.moe_num_lores:
            yield Problem(("moe_lore_top_k", "moe_num_lores"), f"must be at most moe_num_lores ({self.moe_num_lores})")
        if self.moe_lore_projection != "up" and self.moe_lore_interaction != "entangled":
            yield Problem(("moe_lore_projection", "moe_lore_interaction"), "needs moe_lore_interaction: entangled; other LoREs add to no projection")


class DecomposedOptions(ExpertOptions):
    """`decomposed`: CoSMoEs' weight-decomposed experts."""

    moe_decomposition_rank: PositiveInt | None = None
    """decomposed: rank r of the two factors of each matrix. None: `moe_decomposition_fraction` of hidden_size."""
    moe_decomposition_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """decomposed: r as a share of hidden_size, where `moe_decomposition_rank` does not say it."""

    def decomposition_rank(self, hidden_size: int) -> int:
        """r."""
        return self.moe_decomposition_rank or max(1, round(self.moe_decomposition_fraction * hidden_size))

    def check(self) -> Iterator[Problem]:
        if self.moe_decomposition_rank is not None and self.moe_decomposition_fraction != 0.5:
            yield Problem(("moe_decomposition_rank", "moe_decomposition_fraction"), "give either it or moe_decomposition_fraction, not both")


OPTIONS: dict[str, type[ExpertOptions]] = {"grouped": ExpertOptions, "structmoe": LoreOptions, "decomposed": DecomposedOptions}
"""Kind of expert -> the options that it reads."""
