"""The language model's loss where each process has some rows of the output projection.

Shapes: T tokens; D model width; V vocabulary; v its rows on this process; C tokens of one chunk.

As `kernels/linear_cross_entropy/chunked.py`, a chunk of tokens at a time: only the logits of one chunk and of this process's rows exist. The
processes exchange two numbers for each token: the logsumexp of their rows and the label's logit (Shoeybi et al., 2019, section 3, exchange three).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.linear_cross_entropy.chunked import add_outer, chunk_rows, chunks, scaled
from megatron.kernels.linear_cross_entropy.reference import wide
from megatron.kernels.precision import product_dtype
from megatron.mpu.groups import Group
from megatron.mpu.regions import gather


def vocab_parallel_cross_entropy(hidden_TD: Tensor, weight_vD: Tensor, label_T: Tensor, scale_T: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(sum of loss * scale, the loss of each token without gradient), the same on every process of the group.

    `label_T` counts from this process's first row: it lies outside of 0 to v - 1 where another process has it. The gradient of `hidden_TD` is this
    process's part of a sum, that of `weight_vD` is complete.
    """
    dtype = product_dtype(hidden_TD.dtype, hidden_TD.device)
    if not torch.is_grad_enabled():
        hidden_TD, weight_vD = hidden_TD.detach(), weight_vD.detach()
    loss, loss_T = _VocabParallel.apply(hidden_TD.to(dtype), weight_vD.to(dtype), label_T, scale_T, group)
    return loss, loss_T


def joined_logits(logits_BSv: Tensor, group: Group, vocabulary: int) -> Tensor:
    """logits_BSV on every process. Rows are divided as `own_rows` says."""
    if group.size == 1:
        return logits_BSv
    sizes = [len(own_rows(vocabulary, group.size, rank)) for rank in range(group.size)]
    padded = torch.nn.functional.pad(logits_BSv, (0, max(sizes) - logits_BSv.shape[-1]))
    parts = gather(padded, group, -1, summed=False).split(max(sizes), -1)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


def own_rows(vocabulary: int, processes: int, rank: int) -> range:
    """The rows of process `rank`: as even as can be."""
    return range(rank * vocabulary // processes, (rank + 1) * vocabulary // processes)


class _VocabParallel(torch.autograd.Function):
    """Loss and, where wanted, both gradients, computed in the forward chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, label_T: Tensor, scale_T: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        loss_T = torch.empty_like(scale_T)
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_vD, dtype=wide(weight_vD.dtype)) if ctx.needs_input_grad[1] else None
        rows = chunk_rows(len(scale_T), weight_vD.shape[0], hidden_TD.device.type)
        for chunk in chunks(len(scale_T), rows):
            hidden_CD = hidden_TD[chunk]
            error_Cv = _loss_and_error(loss_T[chunk], hidden_CD @ weight_vD.t(), label_T[chunk], group)
            error_Cv = error_Cv.mul_(scale_T[chunk, None]).to(hidden_TD.dtype)
            if grad_hidden is not None:
                torch.mm(error_Cv, weight_vD, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_outer(grad_weight, error_Cv, hidden_CD)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_vD.dtype))
        ctx.mark_non_differentiable(loss_T)
        return torch.dot(loss_T, scale_T), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if saved is None else scaled(saved, grad) for saved in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None


def _loss_and_error(loss_C: Tensor, logits_Cv: Tensor, label_C: Tensor, group: Group) -> Tensor:
    """Writes the losses and returns softmax - one_hot(label) of this process's rows."""
    softmax_Cv = torch.softmax(logits_Cv, 1, dtype=loss_C.dtype)
    own_C = (label_C >= 0) & (label_C < logits_Cv.shape[1])
    place_C1 = label_C.clamp(0, logits_Cv.shape[1] - 1)[:, None]
    own_2C = torch.stack(
        [
            logits_Cv.amax(1).to(loss_C.dtype) - softmax_Cv.amax(1).log(),  # logsumexp of this process's rows
            torch.where(own_C, logits_Cv.gather(1, place_C1)[:, 0].to(loss_C.dtype), 0),
        ]
    )
    every_P2C = [torch.empty_like(own_2C) for _ in range(group.size)]
    torch.distributed.all_gather(every_P2C, own_2C, group=group.handle)
    logsumexp_PC, label_logit_PC = torch.stack(every_P2C, 1)
    logsumexp_C = logsumexp_PC.logsumexp(0)
    loss_C.copy_(logsumexp_C - label_logit_PC.sum(0))
    softmax_Cv.mul_((own_2C[0] - logsumexp_C).exp_()[:, None])
    return softmax_Cv.scatter_add_(1, place_C1, -own_C.to(softmax_Cv.dtype)[:, None])
