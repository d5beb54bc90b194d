"""Keys and values of the tokens seen so far, one cache a layer: allocated once per request and passed as an argument, never kept on a layer.

Shapes: B batch; H key/value heads; P positions that fit; d head dimension; S tokens of this call; E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class CacheError(ValueError):
    """The tokens do not fit into the cache."""


@dataclass
class LayerCache:
    """The cache of one layer and one request."""

    keys_BHPd: Tensor
    values_BHPd: Tensor
    length: int = 0
    """Positions filled."""
    sum_BPE: Tensor | None = None
    """int64: the running sums of a router that looks at a whole text (`routers/document_pool.py`). None: the layer has no such router."""

    def sums_before(self, like_BSE: Tensor) -> Tensor:
        """sum_BE before the S tokens that `append` stored last; zeros at the beginning of the text."""
        before = self.length - like_BSE.shape[1]
        return torch.zeros_like(like_BSE[:, 0]) if self.sum_BPE is None or not before else self.sum_BPE[:, before - 1]

    def keep_sums(self, sum_BSE: Tensor) -> None:
        """Keeps the running sums of the S tokens that `append` stored last."""
        if self.sum_BPE is None:
            self.sum_BPE = sum_BSE.new_zeros(len(sum_BSE), self.keys_BHPd.shape[2], sum_BSE.shape[2])
        self.sum_BPE[:, self.length - sum_BSE.shape[1] : self.length] = sum_BSE

    def append(self, keys_BHSd: Tensor, values_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return all keys and values so far, as views. Raises CacheError where they do not fit."""
        new, room = keys_BHSd.shape[2], self.keys_BHPd.shape[2]
        if keys_BHSd.shape[0] != self.keys_BHPd.shape[0]:
            raise CacheError(f"a batch of {keys_BHSd.shape[0]} for a cache of batch {self.keys_BHPd.shape[0]}; make one cache per request")
        if self.length + new > room:
            raise CacheError(
                f"{self.length} + {new} tokens do not fit into a cache of {room} positions; make it as long as prompt and answer together"
            )
        self.keys_BHPd[:, :, self.length : self.length + new] = keys_BHSd
        self.values_BHPd[:, :, self.length : self.length + new] = values_BHSd
        self.length += new
        return self.keys_BHPd[:, :, : self.length], self.values_BHPd[:, :, : self.length]


def build_cache(model: ModelConfig, batch: int, max_length: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[LayerCache]:
    """Empty caches for one request, one for each layer. Raises CacheError if the model has fewer than `max_length` positions."""
    if max_length > model.max_positions:
        raise CacheError(f"a cache of {max_length} positions: the model has at most {model.max_positions} (max_position_embeddings)")
    shape = (batch, model.attended_kv_heads, max_length, model.head_width)
    keys_and_values = (torch.zeros(2, *shape, dtype=dtype, device=device) for _ in range(model.num_layers))
    return [LayerCache(keys_BHPd=pair[0], values_BHPd=pair[1]) for pair in keys_and_values]
