"""Causal attention with all scores in memory: any device, any dtype; the definition that the others are tested against.

It computes in float32 at least, and rounds once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.kernels.attention.interface import Given, Rotation


def turned(x_BSHd: Tensor, cos_Sn: Tensor, sin_Sn: Tensor) -> Tensor:
    """x with its first n dimensions turned: the definition."""
    half = cos_Sn.shape[-1]
    cos_S1n, sin_S1n = cos_Sn[..., None, :].to(x_BSHd.dtype), sin_Sn[..., None, :].to(x_BSHd.dtype)
    first, second, rest = x_BSHd.tensor_split((half, 2 * half), dim=3)
    return torch.cat([first * cos_S1n - second * sin_S1n, second * cos_S1n + first * sin_S1n, rest], dim=3)


class Reference:
    """Plain products of whole matrices."""

    def forward(self, query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(context_BHSd, log_sum_BHS)."""
        query, key, value = _prepared(query_BHSd, key_BKSd, value_BKSd, rotation)
        scores_BHSS = _scores(query, key)
        log_sum_BHS = scores_BHSS.logsumexp(-1)
        context_BHSd = (scores_BHSS - log_sum_BHS[..., None]).exp() @ value
        return context_BHSd.to(query_BHSd.dtype).transpose(1, 2).contiguous().transpose(1, 2), log_sum_BHS

    def backward(self, given: Given, into: tuple[Tensor, Tensor, Tensor]) -> None:
        """dV = P^T dO;  D = P * (dO V^T - rowsum(dO * O));  dQ = D K / sqrt(d);  dK = D^T Q / sqrt(d)."""
        query, key, value = _prepared(given.query_BHSd, given.key_BKSd, given.value_BKSd, given.rotation)
        grad, context = given.grad_BHSd.to(query.dtype), given.context_BHSd.to(query.dtype)
        weights_BHSS = (_scores(query, key) - given.log_sum_BHS[..., None].to(query.dtype)).exp()
        wide_BHSS = weights_BHSS * (grad @ value.mT - torch.linalg.vecdot(grad, context)[..., None]) / math.sqrt(query.shape[-1])
        gradients = [wide_BHSS @ key, wide_BHSS.mT @ query, weights_BHSS.mT @ grad]
        for place, (out, gradient) in enumerate(zip(into, gradients, strict=True)):
            kv_heads = out.shape[1]
            shared = gradient.unflatten(1, (kv_heads, -1)).sum(2) if place else gradient
            if place < 2 and given.rotation is not None:
                cos, sin = given.rotation
                shared = turned(shared.transpose(1, 2), cos, -sin).transpose(1, 2)
            out.copy_(shared)


def _prepared(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    """Widened and turned, with keys and values repeated for the query heads that share them."""
    dtype, times = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    wide = [t.to(dtype) for t in (query, key, value)]
    if rotation is not None:
        wide[:2] = [turned(t.transpose(1, 2), *rotation).transpose(1, 2) for t in wide[:2]]
    return wide[0], wide[1].repeat_interleave(times, 1), wide[2].repeat_interleave(times, 1)


def _scores(query_BHSd: Tensor, key_BHSd: Tensor) -> Tensor:
    """q k^T / sqrt(d), minus infinity for keys after the query."""
    hidden = torch.ones(query_BHSd.shape[2], key_BHSd.shape[2], dtype=torch.bool, device=query_BHSd.device).triu(1)
    scores: Tensor = query_BHSd @ key_BHSd.mT / math.sqrt(query_BHSd.shape[-1])
    return scores.masked_fill(hidden, -torch.inf)
