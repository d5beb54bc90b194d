"""Sinusoidal positions: fixed waves added to the word embeddings (Vaswani et al., 2017, section 3.5), sines first, then cosines, as in GPT-NeoX.

Shapes: B batch; S sequence; D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.model.positions.derived import DerivedBuffer
from megatron.model.positions.places import Places
from megatron.model.positions.rotary import inverse_frequencies


class SinusoidalPositions(DerivedBuffer):
    """[sin(p f), cos(p f)] for the D/2 frequencies f = 10000^(-2j/D)."""

    def __init__(self, width: int) -> None:
        super().__init__("inv_freq", inverse_frequencies(width, 10000))

    def forward(self, places: Places, length: int) -> Tensor:
        """float32 [S, D], or [B, S, D] where positions start again."""
        angles = places.positions(length, self.numbers.device)[..., None] * self.numbers
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
