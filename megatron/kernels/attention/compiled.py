"""Causal attention by csrc/attention: tiles that stay in the cache, and nothing after a query is computed (FlashAttention-2; Dao, 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.kernels.attention.interface import Given, Rotation
from megatron.kernels.attention.reference import Reference
from megatron.kernels.compiled import DTYPES, WIDENED, address, built, serves


class Compiled:
    """float32, and bfloat16: in 16-bit products where the processor has them, else widened inside. Other formats are the reference's."""

    def __init__(self) -> None:
        self.built = built()
        self.reference = Reference()

    def forward(self, query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(context_BHSd, log_sum_BHS)."""
        if not serves(query_BHSd, key_BKSd, value_BKSd, formats=WIDENED):
            return self.reference.forward(query_BHSd, key_BKSd, value_BKSd, rotation)
        batch, heads, length, dim = query_BHSd.shape
        context_BHSd = query_BHSd.new_empty(batch, length, heads, dim).transpose(1, 2)
        log_sum_BHS = query_BHSd.new_empty(batch, heads, length, dtype=torch.float32)
        inputs = [_rows(t) for t in (query_BHSd, key_BKSd, value_BKSd)]
        self._call(inputs, context_BHSd, log_sum_BHS, rotation, [])
        return context_BHSd, log_sum_BHS

    def backward(self, given: Given, into: tuple[Tensor, Tensor, Tensor]) -> None:
        """Writes the gradients."""
        if not serves(given.grad_BHSd, *given[1:5], formats=WIDENED):
            self.reference.backward(given, into)
            return
        inputs = [_rows(t) for t in given[1:4]]
        gradients = [_rows(given.grad_BHSd), *into]
        self._call(inputs, _rows(given.context_BHSd), given.log_sum_BHS.contiguous(), given.rotation, gradients)

    def _call(self, inputs: list[Tensor], context: Tensor, log_sum: Tensor, rotation: Rotation | None, gradients: list[Tensor]) -> None:
        query_BHSd, key_BKSd, _ = inputs
        batch, heads, length, dim = query_BHSd.shape
        angles = [t.to(torch.float32).contiguous() for t in rotation or ()]
        between_texts = angles[0].stride(0) if angles and angles[0].ndim == 3 else 0
        function = self.built.attention_backward if gradients else self.built.attention_forward
        function(
            [batch, heads, key_BKSd.shape[1], length, dim],
            1 / math.sqrt(dim),
            DTYPES[query_BHSd.dtype],
            torch.get_num_threads(),
            [[address(t), *t.stride()[:3]] for t in (*inputs, context, *gradients)],
            [address(angles[0]), address(angles[1]), between_texts, angles[0].shape[-1]] if angles else [0, 0, 0, 0],
            address(log_sum),
        )


def _rows(x_BHSd: Tensor) -> Tensor:
    """Itself where each row lies together, else a copy."""
    return x_BHSd if x_BHSd.stride(3) == 1 else x_BHSd.contiguous()
