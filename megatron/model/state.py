"""What travels through the layers beside the hidden states: losses and counts are returned, never collected on the side.

Shapes: B batch; S sequence; D model width; A auxiliary losses, in the order of the config; X MoE layers so far; E experts; G LoREs of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """Input and output of every layer."""

    hidden_BSD: Tensor
    aux_losses_A: Tensor
    """float32, unweighted, summed over the MoE layers so far."""
    expert_load_XE: Tensor
    """int64: tokens sent to each expert, a row per MoE layer."""
    lore_load_XG: Tensor
    """int64: tokens sent to each LoRE, a row per MoE layer; G = 0 where there are none."""

    @staticmethod
    def start(hidden_BSD: Tensor, *, num_losses: int, num_experts: int, num_lores: int) -> LayerState:
        """Before the first layer: no losses, no counts."""
        device = hidden_BSD.device
        return LayerState(
            hidden_BSD,
            torch.zeros(num_losses, device=device),
            torch.zeros(0, num_experts, dtype=torch.int64, device=device),
            torch.zeros(0, num_lores, dtype=torch.int64, device=device),
        )
