"""What the attention op is given and what an implementation supplies. Shapes as in `__init__.py`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class HeadLayout(NamedTuple):
    """How a fused query/key/value projection of width W = (H + 2K)*d is divided.

    NeoX's layouts: with as many key/value heads as query heads (q, k, v) head by head, else all queries, all keys, all values.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def views(self, fused_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries BSHd, keys BSKd, values BSKd as views of the fused projection."""
        batch, length, _ = fused_BSW.shape
        if self.heads == self.kv_heads:
            query, key, value = fused_BSW.view(batch, length, self.heads, 3, self.head_dim).unbind(3)
        else:
            heads = fused_BSW.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return query, key, value


class Rotation(NamedTuple):
    """The angles by which queries and keys are turned: their first n dimensions, by rotate-half, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""

    cos_Sn: Tensor
    """float32 [S, n/2], or [B, S, n/2] where positions start again in a text."""
    sin_Sn: Tensor


class Attention(Protocol):
    """What an implementation supplies."""

    def forward(self, query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(context_BHSd, which lies in memory as BSHd; log_sum_BHS, the logarithm of each row's sum of e^score, at least float32)."""
        ...

    def backward(self, given: Given, into: tuple[Tensor, Tensor, Tensor]) -> None:
        """Writes the gradients of queries, keys and values (before they were turned) into the three tensors."""
        ...


class Given(NamedTuple):
    """What the backward is given."""

    grad_BHSd: Tensor
    query_BHSd: Tensor
    key_BKSd: Tensor
    value_BKSd: Tensor
    context_BHSd: Tensor
    log_sum_BHS: Tensor
    rotation: Rotation | None
    """None: queries and keys were not turned."""
