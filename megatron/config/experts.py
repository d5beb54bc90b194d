"""Options of the kinds of expert. Each kind has a class with its own keys. The moe section inherits from all of them, so that the YAML stays flat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.routers import RouterOptions
from megatron.config.section import PositiveInt, Problem


class ExpertOptions(RouterOptions):
    """What every kind of expert knows."""

    moe_ffn_hidden_size: PositiveInt | None = None
    """Hidden width of one expert, before `moe_expert_segments` divides it (Megatron-LM's key). None: `ffn_hidden_size` or `intermediate_size` as
    given. If neither is given: 4 * hidden_size, rounded up to a multiple of 256 (NeoX)."""
    moe_latent_size: PositiveInt | None = None
    """Latent MoE (Megatron-Core's key): width of the experts' input and output. One projection for all experts of a layer makes the hidden state
    narrower before they read it, and another one makes the sum of their results as wide as the hidden state again. Router and shared expert read the
    whole hidden state. None: experts read the hidden state."""
    moe_expert_bias: bool = False
    """Whether the projections of the experts have biases (Megatron-LM's add_bias_linear, for experts only). For dense MLPs see `use_bias_in_mlp`."""
    kernel_backends: dict[str, str] = {}
    """Implementation of each operation, for example {grouped_gemm: reference}. An operation that is not named uses the fastest implementation that
    runs on this machine. {experts: megablocks} computes experts by the package MegaBlocks, and {dispatch: deep_ep} sends tokens to the experts of
    other processes by the package DeepEP. docs/kernels.md has the list, and `--check` shows what runs."""


class LoreOptions(ExpertOptions):
    """`structmoe`: low-rank experts (LoREs) inside every expert."""

    moe_num_lores: PositiveInt = 8
    """StructMoE: number of low-rank experts (LoREs) inside each expert."""
    moe_lore_top_k: PositiveInt = 1
    """StructMoE: number of LoREs for each token. It must be at most `moe_num_lores`."""
    moe_lore_rank: PositiveInt = 64
    """StructMoE: rank of one LoRE. It must be at most the larger width of the matrix that the LoRE is added to. With `moe_lore_routed: false` this
    limit holds for moe_num_lores * moe_lore_rank."""
    moe_lore_normalize: bool = False
    """StructMoE: whether the weights of the chosen LoREs are divided by their sum."""
    moe_lore_init: Literal["layer", "zero"] = "layer"
    """StructMoE: initial values of the second factor of a LoRE. layer: like the layer's own weights. zero: zeros, so that the LoRE has no effect
    at the start."""
    moe_lore_routed: bool = True
    """StructMoE. True: a router chooses the LoREs of each token. False: the paper's ablation without LoRE routers. Each expert then has one LoRE
    of rank moe_num_lores * moe_lore_rank, and it is always on."""
    moe_lore_interaction: Literal["entangled", "standalone", "gated"] = "entangled"
    """StructMoE: what the LoREs change. entangled: they are added to the up-projection, before the activation (equation 2). standalone: they are
    added to the expert's output (the paper's ablation). gated: the activated hidden layer is multiplied by them."""
    moe_lore_projection: Literal["up", "gate", "both"] = "up"
    """StructMoE with a gated activation and entangled LoREs: the projection that the LoREs are added to. both: each projection has its own LoREs,
    and they are chosen together."""

    @property
    def lore_rank(self) -> int:
        """Rank of a LoRE as it is built: without LoRE routers there is one of all ranks together."""
        return self.moe_lore_rank * (1 if self.moe_lore_routed else self.moe_num_lores)

    def check(self) -> Iterator[Problem]:
        if self.moe_lore_top_k > self.moe_num_lores:
            yield Problem(("moe_lore_top_k", "moe_num_lores"), f"must be at most moe_num_lores ({self.moe_num_lores})")
        if self.moe_lore_projection != "up" and self.moe_lore_interaction != "entangled":
            yield Problem(
                ("moe_lore_projection", "moe_lore_interaction"), "needs moe_lore_interaction: entangled; other LoREs are not added to a projection"
            )


class DecomposedOptions(ExpertOptions):
    """`decomposed`: CoSMoEs' weight-decomposed experts."""

    moe_decomposition_rank: PositiveInt | None = None
    """Experts of type decomposed: rank of the two factors of each matrix. None: `moe_decomposition_fraction` of hidden_size."""
    moe_decomposition_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Experts of type decomposed: rank as a share of hidden_size. It is used when `moe_decomposition_rank` is not given."""

    def decomposition_rank(self, hidden_size: int) -> int:
        """r."""
        return self.moe_decomposition_rank or max(1, round(self.moe_decomposition_fraction * hidden_size))

    def check(self) -> Iterator[Problem]:
        if self.moe_decomposition_rank is not None and self.moe_decomposition_fraction != 0.5:
            yield Problem(("moe_decomposition_rank", "moe_decomposition_fraction"), "give either it or moe_decomposition_fraction, not both")


OPTIONS: dict[str, type[ExpertOptions]] = {"grouped": ExpertOptions, "structmoe": LoreOptions, "decomposed": DecomposedOptions}
"""Kind of expert -> the options that it reads."""
