"""What was decided about which token goes where: values that routers return and that dispatch, losses and analysis read.

Shapes: B batch; S sequence; T = B*S tokens; E experts; K experts per token; R routed rows, sorted by expert; M LoREs per expert; L LoREs per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Routing:
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
    """(B, S), for who needs the order of tokens; None while only the router has seen it."""


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


@dataclass(frozen=True)
class LossContext:
    """What an auxiliary loss may know beside the routing."""

    num_experts: int
    top_k: int
