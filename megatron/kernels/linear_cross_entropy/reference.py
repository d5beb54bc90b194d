"""PyTorch's own cross entropy on all logits at once: the definition that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


class Reference:
    """With the logits of all tokens."""

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, loss_T)."""
        logits_TV = (hidden_TD @ weight_VD.t()).to(scale_T.dtype)
        loss_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
        return (loss_T * scale_T).sum(), loss_T.detach()
