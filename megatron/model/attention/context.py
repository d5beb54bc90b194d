"""From the fused projection to what attention computes, in the way that was chosen for the layer (`choice.py`).

Shapes: B batch; S sequence; P positions attended to; H query heads; K key/value heads; d head dimension; W = (H + 2K)*d, the fused width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from megatron.kernels.attention import Rotation, attention, fused_attention
from megatron.model.attention.cache import LayerCache
from megatron.model.attention.sdpa import Attend
from megatron.model.attention.split import Rotary
from megatron.model.positions import Places

if TYPE_CHECKING:
    from megatron.model.attention.self_attention import SelfAttention

Context = Callable[["SelfAttention", Tensor, Places, LayerCache | None], Tensor]
"""(layer, fused_BSW, places, cache or None) -> context_BHSd."""


def split_and_attend(layer: SelfAttention, fused_BSW: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
    """context_BHSd by the layer's two parts. With a cache, the tokens continue those that the cache holds."""
    query_BHSd, key_BKSd, value_BKSd = (part.transpose(1, 2) for part in layer.split(fused_BSW, places))
    key_BKPd, value_BKPd = (key_BKSd, value_BKSd) if cache is None else cache.append(key_BKSd, value_BKSd)
    return layer.attend(query_BHSd, key_BKPd, value_BKPd, places.document_BS, _dropout(layer))


class FusedContext:
    """Cuts, turns and attends in one op. With a cache, dropout or documents kept apart, the layer's two parts compute."""

    def __init__(self, rotary: Rotary | None, backend: str) -> None:
        self.rotary, self.backend = rotary, backend

    def __call__(self, layer: SelfAttention, fused_BSW: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
        if cache is not None or places.document_BS is not None or _dropout(layer):
            return split_and_attend(layer, fused_BSW, places, cache)
        angles = None if self.rotary is None else Rotation(*self.rotary.rows(places, fused_BSW.shape[1], fused_BSW.device))
        return fused_attention(fused_BSW, layer.layout, angles, backend=self.backend)


class KernelAttend:
    """Attends in one op. For single tokens, dropout or documents kept apart it calls `plain`."""

    def __init__(self, plain: Attend, backend: str) -> None:
        self.plain, self.backend = plain, backend

    def __call__(self, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor, document_BS: Tensor | None, dropout: float) -> Tensor:
        """As `Attend` says."""
        if document_BS is not None or dropout or query_BHSd.shape[2] != key_BKPd.shape[2] or query_BHSd.shape[2] == 1:
            return self.plain(query_BHSd, key_BKPd, value_BKPd, document_BS, dropout)
        return attention(query_BHSd, key_BKPd.to(query_BHSd.dtype), value_BKPd.to(query_BHSd.dtype), backend=self.backend)


def _dropout(layer: SelfAttention) -> float:
    return layer.dropout if layer.training else 0.0
