"""The StructMoE up-projection as a loop over experts and LoREs: any device, any dtype; the definition that the others are tested against.

Shapes as in the package's docstring. The rows of x keep their place, so an expert's own product is the plain MoE's bit for bit; what the LoREs add is
computed one expert at a time, while its rows are in the cache. Every product is written straight into its place in one preallocated result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.grouped_gemm.reference import matmul_into, outer_into, row_counts, widened

if TYPE_CHECKING:
    from megatron.kernels.grouped_lore import Gradients, LoreChoice


class Part(NamedTuple):
    """What belongs to one expert."""

    expert: int
    lores: slice
    """Its LoREs."""
    counts: list[int]
    """Rows of each of them."""
    rows: slice
    """Its rows of x."""
    lore_rows: slice
    """Its LoRE rows."""


class Reference:
    """The loop, forward and backward."""

    def forward(self, x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, choice: LoreChoice) -> tuple[Tensor, Tensor]:
        """(h_RF, u_NQ)."""
        dtype = x_RD.dtype
        x_RD, weight_EFD, a_GQD, b_GQF = widened(x_RD, weight_EFD, a_GQD, b_GQF)
        groups = row_counts(choice.order.rows_G, choice.pi_RL.numel())
        h_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
        u_NQ = x_RD.new_empty(sum(groups), a_GQD.shape[1])
        matmul_into(u_NQ, x_RD.index_select(0, _sources(choice)), a_GQD.mT.unbind(), groups)
        z_NQ = u_NQ * _weights(choice, u_NQ.dtype)
        b_matrices = b_GQF.unbind()
        for part in parts(groups, weight_EFD.shape[0], choice):
            h_rF = h_RF[part.rows]
            torch.mm(x_RD[part.rows], weight_EFD[part.expert].t(), out=h_rF)
            y_nF = h_RF.new_empty(sum(part.counts), h_RF.shape[1])
            matmul_into(y_nF, z_NQ[part.lore_rows], b_matrices[part.lores], part.counts)
            _add_rows(h_rF, y_nF, choice.order.inverse_TK[part.rows] - part.lore_rows.start)
        return h_RF.to(dtype), u_NQ.to(dtype)

    def backward(self, grad_RF: Tensor, x_RD: Tensor, weights: tuple[Tensor, Tensor, Tensor], choice: LoreChoice, u_NQ: Tensor) -> Gradients:
        """Gradients of (x_RD, weight_EFD, a_GQD, b_GQF, pi_RL)."""
        dtype = x_RD.dtype
        grad_RF, x_RD, u_NQ, *weights_wide = widened(grad_RF, x_RD, u_NQ, *weights)
        weight_EFD, a_GQD, b_GQF = weights_wide
        groups, source_N, pi_N1 = choice.order.rows_G.tolist(), _sources(choice), _weights(choice, u_NQ.dtype)
        grad_x, grad_weight, grad_a, grad_b = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x_RD, *weights_wide))
        z_NQ, grad_z_NQ, b_matrices = u_NQ * pi_N1, torch.empty_like(u_NQ), b_GQF.mT.unbind()
        for part in parts(groups, weight_EFD.shape[0], choice):
            grad_rF = grad_RF[part.rows]
            torch.mm(grad_rF, weight_EFD[part.expert], out=grad_x[part.rows])
            torch.mm(grad_rF.t(), x_RD[part.rows], out=grad_weight[part.expert])
            grad_nF = grad_rF.index_select(0, source_N[part.lore_rows] - part.rows.start)
            outer_into(grad_b[part.lores], z_NQ[part.lore_rows], grad_nF, part.counts)
            matmul_into(grad_z_NQ[part.lore_rows], grad_nF, b_matrices[part.lores], part.counts)

        pi_dtype = choice.pi_RL.dtype
        product_N = torch.linalg.vecdot(grad_z_NQ.to(pi_dtype), u_NQ.to(pi_dtype))
        grad_pi_RL = torch.empty_like(product_N).scatter_(0, choice.order.order_R, product_N).view(choice.pi_RL.shape)
        grad_u_NQ = grad_z_NQ.mul_(pi_N1)
        outer_into(grad_a, grad_u_NQ, x_RD.index_select(0, source_N), groups)
        y_ND = x_RD.new_empty(len(grad_u_NQ), x_RD.shape[1])
        matmul_into(y_ND, grad_u_NQ, a_GQD.unbind(), groups)
        _add_rows(grad_x, y_ND, choice.order.inverse_TK)
        return grad_x.to(dtype), grad_weight.to(dtype), grad_a.to(dtype), grad_b.to(dtype), grad_pi_RL


def parts(groups: list[int], num_experts: int, choice: LoreChoice) -> Iterator[Part]:
    """The experts in order; both the rows of x and the LoRE rows are sorted by expert."""
    per_expert, per_row = len(groups) // num_experts, max(1, choice.pi_RL.shape[1])
    first = 0
    for expert in range(num_experts):
        lores = slice(expert * per_expert, (expert + 1) * per_expert)
        end = first + sum(groups[lores])
        yield Part(expert, lores, groups[lores], slice(first // per_row, end // per_row), slice(first, end))
        first = end


def _sources(choice: LoreChoice) -> Tensor:
    """int64: the row of x that each LoRE row uses."""
    per_row = choice.pi_RL.shape[1]
    return choice.order.order_R if per_row == 1 else choice.order.order_R // per_row


def _weights(choice: LoreChoice, dtype: torch.dtype) -> Tensor:
    """pi_N1 in LoRE order."""
    return choice.pi_RL.reshape(-1).index_select(0, choice.order.order_R).to(dtype)[:, None]


def _add_rows(out_RF: Tensor, y_NF: Tensor, place_RL: Tensor) -> None:
    """out[r] += sum over l of y[place[r, l]]."""
    rows_NF = y_NF.index_select(0, place_RL.reshape(-1))
    out_RF.add_(rows_NF if place_RL.shape[1] == 1 else rows_NF.view(*place_RL.shape, y_NF.shape[1]).sum(1))
