"""T5's relative positions (Raffel et al., 2020, section 2.1): a learned number for each head and each bucket of distances, added to the scores.

Shapes: H heads; S queries; P keys; N buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.model.initialization import Fill


class RelativePositions(nn.Module):
    """One table for all layers, as in GPT-NeoX, which multiplies it by the square root of the heads' dimension."""

    def __init__(self, heads: int, head_dim: int, buckets: int, max_distance: int, fill: Fill) -> None:
        super().__init__()
        self.buckets, self.max_distance, self.scale = buckets, max_distance, math.sqrt(head_dim)
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        fill(self.weight.data)

    def forward(self, distance_SP: Tensor) -> Tensor:
        """bias_HSP for distances of 0 and more."""
        bucket_SP = relative_bucket(distance_SP, self.buckets, self.max_distance)
        return nn.functional.embedding(bucket_SP, self.weight).movedim(-1, 0) * self.scale


def relative_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """int64 bucket of distances of 0 and more: the first half of the buckets hold one distance each, the others widen up to `max_distance`, and the
    last one has everything beyond.
    """
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (buckets - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp(max=buckets - 1))
