"""Output projection and cross entropy a chunk of tokens at a time: only the logits of one chunk exist. Any device, any dtype.

Shapes: T tokens; D model width; V (padded) vocabulary; C tokens of one chunk.

The forward computes the gradients of hidden states and weight at once, and the backward only scales these gradients. This is the idea of
Liger-Kernel's fused linear cross entropy. The sum over chunks of the weight's gradient is in float32 (float64 for float64). On a GPU the host never
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.linear_cross_entropy.reference import wide
from megatron.kernels.precision import product_dtype

# Numbers in the logits of one chunk. On CPUs 16 MiB of float32 is the fastest that was measured: large enough for fast matrix products, small enough
# for the last-level cache. A GPU needs more rows to be busy: 256 MiB, which is 523 rows of a vocabulary of 128256. The two buffers are made once a
# call: fresh ones for every chunk cost a third more on a CPU (page faults).
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
MIN_CHUNK_ROWS = 64


class Losses(NamedTuple):
    """What one pass over the chunks computes."""

    loss_T: Tensor
    grad_hidden: Tensor | None
    """Of sum(loss * scale), as is the next. None: not wanted."""
    grad_weight: Tensor | None


class Chunked:
    """The loss, chunk by chunk."""

    def loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of loss * scale, loss_T)."""
        dtype = product_dtype(hidden_TD.dtype, hidden_TD.device)
        return LossWithGradients.apply(_compute, hidden_TD.to(dtype), weight_VD.to(dtype), labels_T, scale_T)


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens of a chunk; 0 only for no tokens."""
    return min(tokens, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS.get(device, 2**22) // max(1, vocabulary)))


def meta_stands_for(device: str) -> None:
    """From now on, chunks on the meta device are as large as those on `device` ("cpu" or "cuda"): a plan counts what they hold."""
    CHUNK_ELEMENTS["meta"] = CHUNK_ELEMENTS[device]


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """The tokens, `rows` at a time."""
    return (slice(begin, begin + rows) for begin in range(0, tokens, rows or 1))


def _compute(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor, *, wanted: tuple[bool, bool]) -> Losses:
    loss_T = torch.empty_like(scale_T)
    grad_hidden = torch.empty_like(hidden_TD) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype)) if wanted[1] else None
    rows = chunk_rows(len(scale_T), weight_VD.shape[0], hidden_TD.device.type)
    logits_buffer = hidden_TD.new_empty(rows, weight_VD.shape[0])
    softmax_buffer = torch.empty_like(logits_buffer, dtype=scale_T.dtype)
    for chunk in chunks(len(scale_T), rows):
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
            add_outer(grad_weight, error_CV, hidden_TD[chunk] * scale_C1)
    return Losses(loss_T, grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))


class LossWithGradients(torch.autograd.Function):
    """(sum of loss * scale, loss_T). `compute` makes the gradients that are wanted together with the losses; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Losses], hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = compute(hidden_TD, weight_VD, labels_T, scale_T, wanted=ctx.needs_input_grad[1:3])
        ctx.save_for_backward(found.grad_hidden, found.grad_weight)
        ctx.mark_non_differentiable(found.loss_T)
        return torch.dot(found.loss_T, scale_T), found.loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if saved is None else scaled(saved, grad) for saved in ctx.saved_tensors)
        return None, grad_hidden, grad_weight, None, None


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


def add_outer(out_VD: Tensor, error_CV: Tensor, hidden_CD: Tensor) -> None:
    """out += error^T @ hidden, accumulated in the dtype of `out`."""
    if out_VD.dtype == error_CV.dtype:
        out_VD.addmm_(error_CV.t(), hidden_CD)
    elif out_VD.is_cuda and out_VD.dtype == torch.float32 and torch.cuda.get_device_capability(out_VD.device)[0] >= 8:
        # 16-bit factors, summed into float32 by the product itself: no second buffer of V*D.
        torch.addmm(out_VD, error_CV.t(), hidden_CD, out_dtype=torch.float32, out=out_VD)
    else:
        out_VD.add_(torch.mm(error_CV.t(), hidden_CD))


def scaled(saved: Tensor, grad: Tensor) -> Tensor:
    """saved * grad, without a pass over memory where grad is 1 (known without waiting only on a CPU). Not in place: a retained graph comes again."""
    if grad.device.type == "cpu" and grad.item() == 1:
        return saved
    return saved * grad.to(saved.dtype)
