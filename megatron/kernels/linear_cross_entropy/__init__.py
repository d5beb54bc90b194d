"""The language model's loss straight from the hidden states: output projection and cross entropy in one. The one place this op is defined.

Shapes: T tokens; D model width; V (padded) vocabulary.
    loss_T[t] = logsumexp(hidden_TD[t] @ weight_VD^T) - hidden_TD[t] @ weight_VD[labels_T[t]];     mean = sum(loss_T * scale_T)

The logits of all tokens are the largest tensor of a small model's step (T*V); every implementation but the reference does without it. Softmax and
sums are in float32 (float64 for float64). Implementations bring their gradients along: libraries have them too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron.kernels import compiled
from megatron.kernels.linear_cross_entropy import cce, chunked, liger
from megatron.kernels.linear_cross_entropy.reference import Reference, wide
from megatron.kernels.registry import Implementation, Op


class LinearCrossEntropy(Protocol):
    """What an implementation supplies."""

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, with gradients for hidden and weight; loss_T without). `scale_T` is wide and has no gradient."""
        ...


def _compiled() -> LinearCrossEntropy:
    from megatron.kernels.linear_cross_entropy.compiled import Compiled

    return Compiled()


OP: Op[LinearCrossEntropy] = Op("linear_cross_entropy")
OP.register(compiled.implementation(_compiled))
OP.register(Implementation("chunked", frozenset({"cpu", "cuda", "meta"}), lambda: None, chunked.Chunked))
# By name only: liger waits for the device to count the labels, and cce leaves out what 16-bit numbers hardly see.
OP.register(Implementation("liger", frozenset({"cuda"}), liger.unavailable, liger.Liger))
OP.register(Implementation("cce", frozenset({"cuda"}), cce.unavailable, cce.CutCrossEntropy))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    mask_T: Tensor | None = None,
    *,
    total: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(mean loss, loss of each token) of predicting `labels_T` by hidden @ weight^T; both float32 (float64 for float64).

    The mean is weighted: sum(mask * loss) / sum(mask), plain without a mask, 0 where the mask is 0 everywhere. `total`, a number as a tensor, divides
    the sum in place of sum(mask). The loss of each token is unweighted and carries no gradient. Raises ValueError on shapes that do not fit,
    KernelUnavailable where `backend` cannot run.
    """
    _check(hidden_TD, weight_VD, labels_T, mask_T)
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    scale_T = token_weights(labels_T, mask_T, total, hidden_TD.dtype)
    return OP.resolve(backend, hidden_TD.device.type).loss(hidden_TD, weight_VD, labels_T, scale_T)


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, mask_T: Tensor | None) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"cross entropy: hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} must be [tokens, width], [vocabulary, width]"
        )
    for name, given in (("labels", labels_T), ("mask", mask_T)):
        if given is not None and given.shape != hidden_TD.shape[:1]:
            raise ValueError(f"cross entropy: {name} of shape {tuple(given.shape)} for {hidden_TD.shape[0]} tokens; give one for each token")


def token_weights(labels_T: Tensor, mask_T: Tensor | None, total: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each token's loss counts in the mean."""
    if mask_T is None and total is not None:
        mask_T = torch.ones_like(labels_T)
    if mask_T is None:
        return torch.full(labels_T.shape, 1 / max(1, len(labels_T)), dtype=wide(dtype), device=labels_T.device)
    weight_T = mask_T.to(wide(dtype))
    total = weight_T.sum() if total is None else total.to(weight_T)
    return weight_T / torch.where(total == 0, torch.ones_like(total), total)
