"""Rotary positions and the split of a fused query/key/value projection, in one pass over memory each way.

Shapes: B batch; S sequence; P positions; H query heads; K key/value heads; d head dimension; n dimensions that are turned, of whose n/2 angles
cosines and sines are given; W = (H + 2K)*d, the fused width. Cosines and sines are [S, n/2], or [B, S, n/2] where positions start again in a text.

NeoX's layouts of W: with as many key/value heads as query heads (q, k, v) head by head, else all queries, all keys, all values. The first n
dimensions of each head are turned by rotate-half: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being the first and second n/2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.attention.interface import HeadLayout


def inverse_frequencies(dimensions: int, base: int) -> list[float]:
    """base^(-2j/n) for the n/2 pairs j of dimensions."""
    return [base ** (-2 * pair / dimensions) for pair in range(dimensions // 2)]


@lru_cache(maxsize=8)
def rotary_table(length: int, frequencies: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [length, n/2], computed in float64: the same angles whatever the model's dtype."""
    with torch.inference_mode(False):
        angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
        return angles.cos().float().to(device), angles.sin().float().to(device)


def split_rotated(fused_BSW: Tensor, layout: HeadLayout, cos_Sn: Tensor, sin_Sn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both turned) and values, BSHd, in the dtype of `fused_BSW`."""
    return _SplitRotated.apply(fused_BSW, layout, cos_Sn.to(fused_BSW.dtype), sin_Sn.to(fused_BSW.dtype))


def rotate_into(out_BSHd: Tensor, x_BSHd: Tensor, cos_Sn: Tensor, sin_Sn: Tensor) -> None:
    """out = x with its first n dimensions turned; `out` and `x` do not overlap."""
    half = cos_Sn.shape[-1]
    cos_S1n, sin_S1n = cos_Sn[..., None, :], sin_Sn[..., None, :]
    first, second, rest = x_BSHd.tensor_split((half, 2 * half), dim=3)
    out_first, out_second, out_rest = out_BSHd.tensor_split((half, 2 * half), dim=3)
    torch.mul(first, cos_S1n, out=out_first).addcmul_(second, sin_S1n, value=-1)
    torch.mul(second, cos_S1n, out=out_second).addcmul_(first, sin_S1n)
    if rest.shape[3]:
        out_rest.copy_(rest)


class _SplitRotated(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation, written straight into the gradient of the fused projection."""

    @staticmethod
    def forward(ctx: Any, fused_BSW: Tensor, layout: HeadLayout, cos_Sn: Tensor, sin_Sn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.layout, ctx.shape = layout, fused_BSW.shape
        ctx.save_for_backward(cos_Sn, sin_Sn)
        query, key, value = layout.views(fused_BSW)
        turned = []
        for x_BSHd in (query, key):
            turned.append(torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype, device=x_BSHd.device))
            rotate_into(turned[-1], x_BSHd, cos_Sn, sin_Sn)
        return turned[0], turned[1], value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        cos_Sn, sin_Sn = ctx.saved_tensors
        grad_BSW = torch.empty(ctx.shape, dtype=grad_query.dtype, device=grad_query.device)
        query, key, value = ctx.layout.views(grad_BSW)
        rotate_into(query, grad_query, cos_Sn, -sin_Sn)
        rotate_into(key, grad_key, cos_Sn, -sin_Sn)
        value.copy_(grad_value)
        return grad_BSW, None, None, None
