"""What each query may see, as masks for attention scores.

Shapes: B batch; H heads; S queries, the last of P positions (all of them without a cache).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Sight(NamedTuple):
    """The queries are the last positions of the keys. Each query sees itself and the `window` positions before it (None: all of them)."""

    queries: int
    keys: int
    window: int | None
    device: torch.device

    @property
    def is_plain(self) -> bool:
        """Whether the window hides nothing."""
        return self.window is None or self.keys <= self.window + 1


def distance_SP(sight: Sight) -> Tensor:
    """int64: how far each key lies before each query; negative for keys after it."""
    query_S = torch.arange(sight.keys - sight.queries, sight.keys, device=sight.device)
    return query_S[:, None] - torch.arange(sight.keys, device=sight.device)


@lru_cache(maxsize=8)
def visible_SP(sight: Sight) -> Tensor:
    """bool: whether each query sees each key. All layers share it."""
    with torch.inference_mode(False):
        distance = distance_SP(sight)
        return (distance >= 0) & (distance <= (sight.keys if sight.window is None else sight.window))


@lru_cache(maxsize=2)
def alibi_mask_HSP(sight: Sight, slopes: tuple[float, ...], coefficient: float, dtype: torch.dtype) -> Tensor:
    """ALiBi's bias times `coefficient`, and minus infinity for keys that a query does not see. All layers share it. `slopes`: one for each head."""
    with torch.inference_mode(False):
        slope_H = torch.tensor(slopes, dtype=torch.float32, device=sight.device) * coefficient
        bias_HSP = -slope_H[:, None, None] * distance_SP(sight)
        return bias_HSP.masked_fill_(~visible_SP(sight), -torch.inf).to(dtype)


def within_documents(mask: Tensor, document_BS: Tensor) -> Tensor:
    """[B, 1 or H, S, S]: the given mask (bool, or added to scores), which also hides other documents."""
    same_B1SS = (document_BS[:, :, None] == document_BS[:, None, :])[:, None]
    return mask & same_B1SS if mask.dtype == torch.bool else mask.masked_fill(~same_B1SS, -torch.inf)
