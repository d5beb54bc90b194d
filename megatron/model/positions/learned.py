"""Learned positions: a table added to the word embeddings (Vaswani et al., 2017; GPT-2).

Shapes: B batch; S sequence; P rows; D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.model.initialization import Fill
from megatron.model.positions.places import Places


class LearnedPositions(nn.Module):
    """Position p is row p + offset; OPT's offset is 2."""

    def __init__(self, rows: int, width: int, offset: int, fill: Fill) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(rows, width))
        fill(self.weight.data)

    def forward(self, places: Places, length: int) -> Tensor:
        """[S, D], or [B, S, D] where positions start again."""
        return nn.functional.embedding(places.positions(length, self.weight.device) + self.offset, self.weight)
