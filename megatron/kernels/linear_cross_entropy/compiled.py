"""Output projection and cross entropy by csrc/linear_cross_entropy: exponentials are taken while the logits of a block are in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.compiled import DTYPES, addresses, built, serves
from megatron.kernels.linear_cross_entropy.chunked import Chunked, Losses, LossWithGradients

CHUNK_BYTES = 2**25
"""Of a chunk's exponentials, which csrc keeps: the best that was measured (2**22 to 2**26)."""
MIN_CHUNK_ROWS = 256
"""Of a large vocabulary. 64 rows take 1.4 times as long, 512 rows 0.9 times, because the weight's gradient passes through memory for every chunk."""


def chunk_rows(tokens: int, vocabulary: int, item_size: int) -> int:
    """Tokens of a chunk, at least 1."""
    return max(1, min(tokens, max(MIN_CHUNK_ROWS, CHUNK_BYTES // (item_size * max(1, vocabulary)))))


class Compiled:
    """The loss. A format that csrc lacks (float16), and a width of 0, are left to `chunked`."""

    def __init__(self) -> None:
        self.built = built()
        self.chunked = Chunked()

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, loss_T). Raises ValueError for a label outside the vocabulary."""
        if not serves(hidden_TD, weight_VD) or not hidden_TD.shape[1]:
            return self.chunked.loss(hidden_TD, weight_VD, labels_T, scale_T)
        return LossWithGradients.apply(self._compute, hidden_TD, weight_VD, labels_T, scale_T)

    def _compute(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor, *, wanted: tuple[bool, bool]) -> Losses:
        hidden_TD, weight_VD, scale_T = (t.contiguous() for t in (hidden_TD, weight_VD, scale_T))
        labels_T = labels_T.to(torch.int64).contiguous()
        tokens, vocabulary = len(labels_T), len(weight_VD)
        losses = Losses(
            torch.empty_like(scale_T), *(torch.empty_like(t) if want else None for t, want in zip((hidden_TD, weight_VD), wanted, strict=True))
        )
        sizes = [*hidden_TD.shape, vocabulary, chunk_rows(tokens, vocabulary, hidden_TD.element_size())]
        given = addresses(hidden_TD, weight_VD, labels_T, scale_T, *losses)
        self.built.linear_cross_entropy(given, sizes, DTYPES[hidden_TD.dtype], torch.get_num_threads())
        return losses
