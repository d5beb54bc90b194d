"""Options of experts without a matrix product: zero, copy and constant experts (MoE++)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.routers import RouterOptions
from megatron.config.section import Fraction, NaturalInt, Problem

KEYS = ("moe_zero_experts", "moe_copy_experts", "moe_constant_experts")


class ZeroComputationOptions(RouterOptions):
    """What a router may choose beside the experts with weights."""

    moe_zero_experts: NaturalInt = 0
    """MoE++: number of zero experts in each MoE layer. A zero expert gives 0, so a token that chooses it skips an expert."""
    moe_copy_experts: NaturalInt = 0
    """MoE++: number of copy experts in each MoE layer. A copy expert gives its input."""
    moe_constant_experts: NaturalInt = 0
    """MoE++: number of constant experts in each MoE layer. A constant expert gives a mixture of its input and a trained vector. A trained softmax
    gives each token the two weights of the mixture."""
    moe_zero_computation_balance: Fraction = 0.75
    """MoE++: tau, the weight of zero, copy and constant experts in the loss `heterogeneous_load_balance`. A smaller number sends more tokens to them.
    1: the loss is `load_balance`."""

    @property
    def num_zero_computation(self) -> int:
        """Zero, copy and constant experts of a layer."""
        return self.moe_zero_experts + self.moe_copy_experts + self.moe_constant_experts

    @property
    def num_choices(self) -> int:
        """Experts that the router of a layer chooses from: those with weights first, then zero, copy and constant experts."""
        return self.num_experts + self.num_zero_computation

    def check(self) -> Iterator[Problem]:
        if self.num_zero_computation and getattr(self, "moe_router_num_groups", None) is not None:
            keys = ("moe_router_num_groups", next(key for key in KEYS if getattr(self, key)))
            yield Problem(
                keys, "divides the experts with weights into groups, and zero, copy and constant experts are in no group; remove one of the two"
            )
