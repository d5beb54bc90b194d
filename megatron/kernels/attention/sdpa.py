"""Causal attention by PyTorch's scaled_dot_product_attention. A model calls that function itself, without this op, and saves a second forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.kernels.attention.interface import Given, Rotation
from megatron.kernels.attention.reference import turned


class Sdpa:
    """The backward computes the forward again."""

    def forward(self, query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(context_BHSd, nothing useful: zeros)."""
        context_BHSd = _attention(query_BHSd, key_BKSd, value_BKSd, rotation).transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.promote_types(query_BHSd.dtype, torch.float32)
        return context_BHSd, query_BHSd.new_zeros(query_BHSd.shape[:3], dtype=wide)

    def backward(self, given: Given, into: tuple[Tensor, Tensor, Tensor]) -> None:
        """Writes the gradients."""
        with torch.enable_grad():
            query, key, value = (t.detach().requires_grad_() for t in (given.query_BHSd, given.key_BKSd, given.value_BKSd))
            gradients = torch.autograd.grad(_attention(query, key, value, given.rotation), (query, key, value), given.grad_BHSd)
        for out, gradient in zip(into, gradients, strict=True):
            out.copy_(gradient)


def _attention(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> Tensor:
    if rotation is not None:
        query, key = (turned(t.transpose(1, 2), *rotation).transpose(1, 2) for t in (query, key))
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
