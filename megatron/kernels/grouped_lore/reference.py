"""The StructMoE up-projection as a loop over experts and LoREs: any device, any dtype; the definition that the others are tested against.

Shapes as in the package's docstring. With one LoRE per row and x in LoRE order every product adds straight into its rows of h (addmm), so nothing
of width F is gathered, scattered or allocated beside h. Otherwise the LoRE rows are gathered, multiplied, and summed back along the inverse order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.kernels.grouped_gemm.reference import matmul_into, outer_into, row_counts

if TYPE_CHECKING:
    from megatron.kernels.grouped_lore import LoreRows


class Reference:
    """The loop, forward and backward."""

    def forward(self, x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, rows: LoreRows) -> tuple[Tensor, Tensor]:
        """(h_RF, u_NQ)."""
        groups, experts = counts(rows, x_RD.shape[0], weight_EFD.shape[0])
        h_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
        matmul_into(h_RF, x_RD, weight_EFD.mT.unbind(), experts)
        u_NQ = x_RD.new_empty(sum(groups), a_GQD.shape[1])
        matmul_into(u_NQ, _gather(x_RD, rows), a_GQD.mT.unbind(), groups)
        z_NQ = u_NQ * rows.pi_N.to(u_NQ.dtype)[:, None]
        _add_products(h_RF, z_NQ, b_GQF.unbind(), groups, rows)
        return h_RF, u_NQ

    def backward(self, grad_RF: Tensor, x_RD: Tensor, weights: tuple[Tensor, Tensor, Tensor], rows: LoreRows, u_NQ: Tensor) -> tuple[Tensor, ...]:
        """Gradients of (x_RD, weight_EFD, a_GQD, b_GQF, pi_N)."""
        weight_EFD, a_GQD, b_GQF = weights
        groups, experts = counts(rows, x_RD.shape[0], weight_EFD.shape[0])
        grad_x, grad_weight, grad_a, grad_b = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x_RD, *weights))
        matmul_into(grad_x, grad_RF, weight_EFD.unbind(), experts)
        outer_into(grad_weight, grad_RF, x_RD, experts)

        pi_N1 = rows.pi_N.to(u_NQ.dtype)[:, None]
        x_ND, grad_NF = _gather(x_RD, rows), _gather(grad_RF, rows)
        outer_into(grad_b, u_NQ * pi_N1, grad_NF, groups)
        grad_z_NQ = torch.empty_like(u_NQ)
        matmul_into(grad_z_NQ, grad_NF, b_GQF.mT.unbind(), groups)
        grad_pi_N = torch.linalg.vecdot(grad_z_NQ.to(rows.pi_N.dtype), u_NQ.to(rows.pi_N.dtype))
        grad_u_NQ = grad_z_NQ.mul_(pi_N1)
        outer_into(grad_a, grad_u_NQ, x_ND, groups)
        _add_products(grad_x, grad_u_NQ, a_GQD.unbind(), groups, rows)
        return grad_x, grad_weight, grad_a, grad_b, grad_pi_N


def counts(rows: LoreRows, total: int, num_experts: int) -> tuple[list[int], list[int]]:
    """Rows of each LoRE, and rows of x of each expert; raises ValueError where they do not sum up."""
    groups = row_counts(rows.rows_G, rows.pi_N.shape[0])
    per_expert, per_row = len(groups) // num_experts, (rows.pi_N.shape[0] // total if total else 1)
    return groups, [sum(groups[e * per_expert : (e + 1) * per_expert]) // per_row for e in range(num_experts)]


def _gather(x_RD: Tensor, rows: LoreRows) -> Tensor:
    """The row of x that each LoRE row uses."""
    if rows.order_N is None or x_RD.shape[0] == 0:
        return x_RD
    return x_RD.index_select(0, rows.order_N // (rows.order_N.shape[0] // x_RD.shape[0]))


def _add_products(out_RF: Tensor, z_NQ: Tensor, weights: tuple[Tensor, ...], groups: list[int], rows: LoreRows) -> None:
    """out[row of n] += z[n] @ weights[g(n)]."""
    if rows.order_N is None:
        for out, z, weight in zip(out_RF.split(groups), z_NQ.split(groups), weights, strict=True):
            if len(z):
                out.addmm_(z, weight)
    elif len(z_NQ):
        y_NF = out_RF.new_empty(z_NQ.shape[0], out_RF.shape[1])
        matmul_into(y_NF, z_NQ, weights, groups)
        inverse_N = torch.empty_like(rows.order_N).scatter_(0, rows.order_N, torch.arange(len(rows.order_N), device=y_NF.device))
        out_RF.add_(y_NF.index_select(0, inverse_N).view(out_RF.shape[0], -1, out_RF.shape[1]).sum(1))
