"""The language model's loss straight from the hidden states: output projection and cross entropy in one, a chunk of tokens at a time.

Shapes: T tokens; D model width; V (padded) vocabulary; C tokens of one chunk.

The logits of all tokens are the largest tensor of a small model's step (T*V). Here only the logits of one chunk exist at a time, which are small
enough
for the cache. The forward computes the gradients of hidden states and weight from them at once, and the backward only scales these gradients. This is
the idea of Liger-Kernel's fused linear cross entropy. Softmax is in float32 (float64 for float64), and so is the sum over chunks of the weight's
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.precision import product_dtype

# Numbers in the logits of one chunk. 16 MiB of float32 is the fastest on the CPUs this was measured on: large enough for fast matrix products, small
# enough for the last-level cache. The two buffers are made once a call: fresh ones for every chunk cost a third more (page faults).
CHUNK_ELEMENTS = 2**22
MIN_CHUNK_ROWS = 64


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, mask_T: Tensor | None = None, *, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mean loss, loss of each token) of predicting `labels_T` by hidden @ weight^T; both float32 (float64 for float64).

    The mean is weighted: sum(mask * loss) / sum(mask), plain without a mask, 0 where the mask is 0 everywhere. `total`, a number as a tensor, divides
    the sum in place of sum(mask). The loss of each token is unweighted and carries no gradient. Raises ValueError on shapes that do not fit.
    """
    _check(hidden_TD, weight_VD, labels_T, mask_T)
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    dtype = product_dtype(hidden_TD.dtype, hidden_TD.device)
    return _LinearCrossEntropy.apply(hidden_TD.to(dtype), weight_VD.to(dtype), labels_T, _token_weights(labels_T, mask_T, total, dtype))


def plain_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, mask_T: Tensor | None = None, *, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own cross entropy on all logits at once: the definition that `linear_cross_entropy` is tested against."""
    _check(hidden_TD, weight_VD, labels_T, mask_T)
    logits_TV = (hidden_TD @ weight_VD.t()).to(_wide(hidden_TD.dtype))
    loss_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
    return (loss_T * _token_weights(labels_T, mask_T, total, hidden_TD.dtype)).sum(), loss_T.detach()


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, mask_T: Tensor | None) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"cross entropy: hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} must be [tokens, width], [vocabulary, width]"
        )
    for name, given in (("labels", labels_T), ("mask", mask_T)):
        if given is not None and given.shape != hidden_TD.shape[:1]:
            raise ValueError(f"cross entropy: {name} of shape {tuple(given.shape)} for {hidden_TD.shape[0]} tokens; give one for each token")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


def _token_weights(labels_T: Tensor, mask_T: Tensor | None, total: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each token's loss counts in the mean."""
    if mask_T is None and total is not None:
        mask_T = torch.ones_like(labels_T)
    if mask_T is None:
        return torch.full(labels_T.shape, 1 / max(1, len(labels_T)), dtype=_wide(dtype), device=labels_T.device)
    weight_T = mask_T.to(_wide(dtype))
    total = weight_T.sum() if total is None else total.to(weight_T)
    return weight_T / torch.where(total == 0, torch.ones_like(total), total)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and, where wanted, both gradients, computed in the forward chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        loss_T = torch.empty_like(scale_T)
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype)) if ctx.needs_input_grad[1] else None
        rows = min(len(scale_T), max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // weight_VD.shape[0]))
        logits_buffer = hidden_TD.new_empty(rows, weight_VD.shape[0])
        softmax_buffer = torch.empty_like(logits_buffer, dtype=scale_T.dtype)
        for chunk in (slice(begin, begin + rows) for begin in range(0, len(scale_T), rows or 1)):
            logits_CV = torch.mm(hidden_TD[chunk], weight_VD.t(), out=logits_buffer[: len(scale_T[chunk])])
            softmax_CV = softmax_buffer[: len(logits_CV)]
            _softmax_into(softmax_CV, loss_T[chunk], logits_CV, labels_T[chunk])
            if grad_hidden is None and grad_weight is None:
                continue
            _subtract_labels(softmax_CV, labels_T[chunk])
            error_CV = softmax_CV.to(hidden_TD.dtype)
            scale_C1 = scale_T[chunk, None].to(hidden_TD.dtype)
            if grad_hidden is not None:
                torch.mm(error_CV, weight_VD, out=grad_hidden[chunk]).mul_(scale_C1)
            if grad_weight is not None:
                _add_outer(grad_weight, error_CV, hidden_TD[chunk] * scale_C1)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(loss_T)
        return torch.dot(loss_T, scale_T), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if saved is None else _scaled(saved, grad) for saved in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def _softmax_into(softmax_CV: Tensor, loss_C: Tensor, logits_CV: Tensor, labels_C: Tensor) -> None:
    """Writes the chunk's softmax and losses.

    logsumexp = maximum - log(softmax of the maximum): one pass of exponentials, and never the logarithm of a vanishing number.
    """
    torch.softmax(logits_CV, 1, dtype=softmax_CV.dtype, out=softmax_CV)
    label_logit_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    loss_C.copy_(logits_CV.amax(1)).sub_(label_logit_C).sub_(softmax_CV.amax(1).log_())


def _subtract_labels(softmax_CV: Tensor, labels_C: Tensor) -> None:
    """softmax - one_hot(label), in place: one entry a row, so nothing is added twice and the result is deterministic."""
    minus_one = torch.full((1, 1), -1, dtype=softmax_CV.dtype, device=softmax_CV.device).expand(len(labels_C), 1)
    softmax_CV.scatter_add_(1, labels_C[:, None], minus_one)


def _add_outer(out_VD: Tensor, error_CV: Tensor, hidden_CD: Tensor) -> None:
    """out += error^T @ hidden, accumulated in the dtype of `out`."""
    if out_VD.dtype == error_CV.dtype:
        out_VD.addmm_(error_CV.t(), hidden_CD)
    else:
        out_VD.add_(torch.mm(error_CV.t(), hidden_CD))


def _scaled(saved: Tensor, grad: Tensor) -> Tensor:
    """saved * grad, without a pass over memory where grad is 1 (known without waiting only on a CPU). Not in place: a retained graph comes again."""
    if grad.device.type == "cpu" and grad.item() == 1:
        return saved
    return saved * grad.to(saved.dtype)
