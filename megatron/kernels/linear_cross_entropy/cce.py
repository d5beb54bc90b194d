"""Apple's cut cross-entropy (25.1): no logits in memory at all. 16-bit numbers only."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def unavailable() -> str | None:
    """Why it cannot run. None: it can."""
    missing = [name for name in ("cut_cross_entropy", "triton") if find_spec(name) is None]
    return f"the package {missing[0]} is not installed (pip install cut-cross-entropy triton)" if missing else None


class CutCrossEntropy:
    """`linear_cross_entropy` with a loss for each token, and with every gradient: nothing is filtered out."""

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, loss_T). Raises ValueError for other than 16-bit numbers."""
        from cut_cross_entropy import linear_cross_entropy

        if hidden_TD.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"linear_cross_entropy: cce computes in bfloat16 and float16, not {hidden_TD.dtype}; use chunked")
        if not len(labels_T):
            return 0 * (hidden_TD.sum() + weight_VD.sum()).to(scale_T.dtype), torch.zeros_like(scale_T)
        ignore_none = -1  # a label that no token has: the scale decides what counts
        loss_T = linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=ignore_none, reduction="none", filter_eps=None, impl="cce")
        loss_T = loss_T.to(scale_T.dtype)
        return (loss_T * scale_T).sum(), loss_T.detach()
