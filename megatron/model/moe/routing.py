"""The decisions of routers about which expert each token goes to. Routers return these values; dispatch, losses and analysis read them.

Shapes: B batch; S sequence; T = B*S tokens; E experts; K experts per token; R routed rows, sorted by expert; M LoREs per expert; L LoREs per row;
C counts of scores; P width of a router's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron.kernels.permute import Order, sort_by_group


class Softmax(NamedTuple):
    """What the op `route` computed along with a router's softmax and choice, so that nobody computes it again."""

    logsumexp_T: Tensor
    total_E: Tensor
    """Sum of the probabilities over the tokens."""
    entropy: Tensor
    """Mean entropy of the probabilities in nats, without gradient."""
    order: Order
    """The choices sorted by expert."""


class Routing(NamedTuple):
    """A router's decision for every token."""

    expert_TK: Tensor
    """int64: the experts of each token."""
    weight_TK: Tensor
    """What each expert's output is multiplied by."""
    probability_TE: Tensor
    """float32 (float64 in a float64 model)."""
    logit_TE: Tensor
    """float32 (float64 in a float64 model)."""
    batch_shape: tuple[int, int] | None = None
    """(B, S), for code that needs the order of tokens. None: only the router has seen the routing yet."""
    padded: bool = False
    """Whether tokens may use fewer than K experts: their other places hold expert number E, which does not exist, and weight 0."""
    softmax: Softmax | None = None
    """None: the router does not use the op `route`. Whoever replaces the choices, probabilities or logits has to set it to None."""
    scores_C: Tensor | None = None
    """int64: how many tokens have a score in each bin, for the router's `balance` (`routers.histogram`). None: it does not ask for them, or this is
    no training."""
    memory_TP: Tensor | None = None
    """What the router of the next layer gets (`Surroundings.memory_TP`). None: this router remembers nothing."""

    def rows_E(self, num_experts: int) -> Tensor:
        """int64: how many tokens use each expert, without waiting for the device."""
        if self.softmax is not None:
            return self.softmax.order.rows_G
        expert_R = self.expert_TK.flatten()
        return expert_R.new_zeros(num_experts + 1).scatter_add_(0, expert_R, torch.ones_like(expert_R))[:num_experts]


class LoreRouting(NamedTuple):
    """The second router's decision for every routed row, in the order of the rows that the experts were given."""

    lore_RL: Tensor
    """int64: LoREs of the row's expert, 0 to M - 1."""
    weight_RL: Tensor
    """pi of equation 1."""
    probability_RM: Tensor
    """float32 (float64 in a float64 model)."""
    logit_RM: Tensor
    """float32 (float64 in a float64 model)."""
    rows_G: Tensor
    """int64: rows of each LoRE of each expert, G = E*M."""
    total_EM: Tensor | None = None
    """Sum of the probabilities over each expert's rows. None: it has not been computed."""


class Decision(NamedTuple):
    """What the routers of one layer decided about its tokens."""

    routing: Routing
    lores: LoreRouting | None
    """None: the experts have no second router."""
    num_experts: int

    def chosen(self) -> Chosen:
        """The choices token by token, on the CPU."""
        expert_TK = self.routing.expert_TK
        lore_TKL = None
        if self.lores is not None:
            order = sort_by_group(expert_TK, self.num_experts, padded=self.routing.padded)
            empty_1L = self.lores.lore_RL.new_full((1, self.lores.lore_RL.shape[1]), -1)  # the place of an empty choice is one beyond the last row
            last = len(self.lores.lore_RL)  # rows after it are of experts without LoREs
            lore_TKL = torch.cat([self.lores.lore_RL, empty_1L])[order.inverse_TK.clamp(max=last)].cpu()
        return Chosen(expert_TK.where(expert_TK < self.num_experts, -1).cpu(), self.routing.weight_TK.detach().float().cpu(), lore_TKL)


class Chosen(NamedTuple):
    """The experts of each token of one layer, for people and files."""

    expert_TK: Tensor
    """int64; -1 where a token uses fewer than K."""
    weight_TK: Tensor
    """float32: what each expert's output is multiplied by."""
    lore_TKL: Tensor | None = None
    """int64: the LoREs inside each chosen expert, from 0 to M - 1; -1 where there is no expert. None: the experts have no second router."""


def _over_one_process(count_E: Tensor) -> Tensor:
    return count_E


class LossContext(NamedTuple):
    """What an auxiliary loss may use besides the routing."""

    num_experts: int
    """Experts that the router chooses from."""
    top_k: int
    rows_E: Tensor | None = None
    """int64: rows that each expert with weights got. None: only a routing is known."""
    lores: LoreRouting | None = None
    """The experts' second routing; None without LoREs."""
    earlier_rows_E: Tensor | None = None
    """int64: rows that each expert got in the earlier micro-batches of this step, over all processes; None in the first."""
    sum_over_processes: Callable[[Tensor], Tensor] = _over_one_process
    """Adds up integer counts over the data-parallel processes."""
    temperature: float = 1.0
    """tau of block-wise expert selection."""
    num_layers: int = 1
    """Layers of the model that have experts."""
    earlier_usage_2E: Tensor | None = None
    """`expert_usage` summed over the layers before this one, for losses over all layers together; None in the first."""
    num_zero_computation: int = 0
    """How many of the experts need no matrix product; they are the last ones."""
    zero_computation_balance: float = 1.0
    """tau of `heterogeneous_load_balance`."""


AuxLoss = Callable[[Routing, LossContext], Tensor]
"""A pure function: (routing, context) -> scalar."""


def looks_at_later_tokens(model: nn.Module) -> bool:
    """Whether a router of the model chooses a token's experts by later tokens and other texts too (`looks_at_later_tokens = True` in its class)."""
    return any(getattr(module, "looks_at_later_tokens", False) for module in model.modules())
