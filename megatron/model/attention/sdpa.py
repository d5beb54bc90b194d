"""Attention by PyTorch's scaled_dot_product_attention, on every device, with the mask that the model's window and positions ask for.

Shapes: B batch; H query heads; K key/value heads; S queries, the last of P positions; d head dimension.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.model.attention.mask import Sight, alibi_mask_HSP, distance_SP, visible_SP, within_documents
from megatron.model.positions.rpe import RelativePositions


class Attend(Protocol):
    """softmax(q k^T / sqrt(d) + bias) v over what each query may see."""

    def __call__(self, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor, document_BS: Tensor | None, dropout: float) -> Tensor:
        """context_BHSd. With documents (S = P) a query sees its own only; None: all up to itself. `dropout` is the share of weights dropped."""
        ...


class CausalSdpa:
    """Every query sees itself and the `window` positions before it; None: all of them."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def __call__(self, query_BHSd: Tensor, key_BKPd: Tensor, value_BKPd: Tensor, document_BS: Tensor | None, dropout: float) -> Tensor:
        queries = query_BHSd.shape[2]
        if self.window is not None:
            key_BKPd, value_BKPd = (part[:, :, -(queries + self.window) :] for part in (key_BKPd, value_BKPd))
        sight = Sight(queries, key_BKPd.shape[2], self.window, query_BHSd.device)
        mask = self.mask(sight, query_BHSd.dtype)
        if document_BS is not None:
            mask = within_documents(visible_SP(sight) if mask is None else mask, document_BS)
        return nn.functional.scaled_dot_product_attention(
            query_BHSd,
            key_BKPd.to(query_BHSd.dtype),
            value_BKPd.to(query_BHSd.dtype),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and sight.queries == sight.keys,
            enable_gqa=query_BHSd.shape[1] != key_BKPd.shape[1],
        )

    def mask(self, sight: Sight, dtype: torch.dtype) -> Tensor | None:
        """visible_SP. None if a single query sees all keys, or if the causal mask alone is enough."""
        if sight.queries == 1 or (sight.queries == sight.keys and sight.is_plain):
            return None
        return visible_SP(sight)


class AlibiSdpa(CausalSdpa):
    """With ALiBi's bias, times `coefficient`, on the scores."""

    def __init__(self, window: int | None, slopes: tuple[float, ...], coefficient: float) -> None:
        super().__init__(window)
        self.slopes, self.coefficient = slopes, coefficient

    def mask(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """mask_HSP, added to the scores."""
        return alibi_mask_HSP(sight, self.slopes, self.coefficient, dtype)


class RelativeSdpa(CausalSdpa):
    """With T5's bias, times `coefficient`, on the scores."""

    def __init__(self, window: int | None, positions: RelativePositions, coefficient: float) -> None:
        super().__init__(window)
        self.positions, self.coefficient = positions, coefficient

    def mask(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """mask_HSP, added to the scores; it has a gradient."""
        bias_HSP = self.coefficient * self.positions(distance_SP(sight).clamp(min=0))
        return bias_HSP.masked_fill(~visible_SP(sight), -torch.inf).to(dtype)
