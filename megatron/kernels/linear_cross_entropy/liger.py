"""Liger-Kernel's fused linear cross entropy (0.8): a chunk of logits at a time, computed again in the backward.

It waits for the device once a call.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def unavailable() -> str | None:
    """Why it cannot run. None: it can."""
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    return f"the package {missing[0]} is not installed (pip install liger-kernel triton)" if missing else None


class Liger:
    """`LigerFusedLinearCrossEntropyFunction` with a loss for each token, so that a mask with fractions is possible."""

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, loss_T). Gradients of a 16-bit weight are summed in float32."""
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        if not len(labels_T):  # Liger cannot cut no rows into chunks
            return 0 * (hidden_TD.sum() + weight_VD.sum()).to(scale_T.dtype), torch.zeros_like(scale_T)
        ignore_none = -1  # a label that no token has: the scale decides what counts
        # In Liger's order: bias, class weights, ignored label, z-loss, smoothing, reduction, soft cap, return of the z-loss, dtype of sums.
        options = (None, None, ignore_none, 0.0, 0.0, "none", None, False, torch.float32)
        loss_T = LigerFusedLinearCrossEntropyFunction.apply(hidden_TD, weight_VD, labels_T, *options)[0].to(scale_T.dtype)
        return (loss_T * scale_T).sum(), loss_T.detach()
