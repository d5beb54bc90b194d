"""Mixture of experts: how many, which router, which kind of expert, which losses. Names are those of `megatron.config.components`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron.config.components import EXPERTS, LOSSES, ROUTERS, UnknownComponent, check_known
from megatron.config.model import ModelConfig
from megatron.config.section import Fraction, PositiveInt, Problem, Section


class MoEConfig(Section):
    moe_num_experts: PositiveInt = 1
    """Experts in each MoE layer; 1 means that every layer is dense."""
    moe_top_k: PositiveInt = 1
    """Experts that each token is sent to."""
    moe_expert_interval: PositiveInt = 1
    """Layer i has experts when i is a multiple of this (layer 0 always)."""
    moe_router_type: str = "topk"
    """Name of the router that chooses experts."""
    moe_jitter_eps: Fraction | None = None
    """In training the router's input is multiplied by a random factor from 1 - eps to 1 + eps. None: no jitter."""
    moe_normalize_top_k: bool = False
    """Divide the weights of a token's chosen experts by their sum (Mixtral); otherwise they are the plain probabilities."""
    moe_expert_type: str = "grouped"
    """Name of the kind of expert: `grouped` (MLPs) or `structmoe` (MLPs with routed low-rank experts inside)."""
    moe_num_lores: PositiveInt = 8
    """StructMoE: low-rank experts (LoREs) inside each expert, M."""
    moe_lore_top_k: PositiveInt = 1
    """StructMoE: LoREs that each token uses, l; at most `moe_num_lores`."""
    moe_lore_rank: PositiveInt = 64
    """StructMoE: rank of one LoRE, Q."""
    moe_lore_normalize: bool = False
    """StructMoE: divide the weights of the chosen LoREs by their sum."""
    moe_lore_init: Literal["layer", "zero"] = "layer"
    """StructMoE: initial second factor of a LoRE: like the layer's own weights, or zero (the LoRE starts without effect)."""
    moe_losses: dict[str, float] = {}
    """Auxiliary losses and their coefficients, e.g. {load_balance: 0.01, z_loss: 0.001}; a loss that is not named is not computed."""
    kernel_backends: dict[str, str] = {}
    """Implementation to use for an operation, e.g. {grouped_gemm: reference}; operations that are not named use the fastest that runs here."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether transformer layer `layer` (from 0) has experts instead of a dense MLP."""
        return self.moe_num_experts > 1 and layer % self.moe_expert_interval == 0

    def expert_width(self, model: ModelConfig) -> int:
        """Hidden width F of one expert: `ffn_hidden_size` or `intermediate_size` as it is, else 4 * hidden_size rounded up to a multiple of 256."""
        return model.ffn_hidden_size or model.mlp_size or -(-4 * model.hidden_size // 256) * 256

    def check(self) -> Iterator[Problem]:
        if self.moe_top_k > self.moe_num_experts:
            yield Problem(("moe_top_k", "moe_num_experts"), f"must be at most moe_num_experts ({self.moe_num_experts})")
        if self.moe_lore_top_k > self.moe_num_lores:
            yield Problem(("moe_lore_top_k", "moe_num_lores"), f"must be at most moe_num_lores ({self.moe_num_lores})")
        if self.moe_router_type.lower() == "sinkhorn" and self.moe_router_type not in ROUTERS:
            yield Problem(("moe_router_type",), "is not part of this version; write topk, and moe_losses: {load_balance: 0.01} for the balance")
        else:
            yield from _unknown_name("moe_router_type", ROUTERS, self.moe_router_type)
        yield from _unknown_name("moe_expert_type", EXPERTS, self.moe_expert_type)
        if self.moe_expert_type == "structmoe" and self.moe_num_experts == 1:
            yield Problem(("moe_expert_type", "moe_num_experts"), "needs moe_num_experts of 2 or more; with 1 every layer is dense")
        for name, coefficient in self.moe_losses.items():
            yield from _unknown_name(f"moe_losses.{name}", LOSSES, name)
            if coefficient < 0:
                yield Problem((f"moe_losses.{name}",), "must be 0 or more")


def _unknown_name(key: str, registry: Mapping[str, Any], name: str) -> Iterator[Problem]:
    try:
        check_known(registry, name)
    except UnknownComponent as error:
        yield Problem((key,), str(error))
