"""Row permutation by `index_select`: any device, any dtype; the definition that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


class Reference:
    """Gathers along the permutation and its inverse."""

    def gather(self, x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        """rows_RD[r] = x_TD[order_R[r] // top_k]."""
        return x_TD.index_select(0, order_R if top_k == 1 else order_R // top_k)

    def combine(self, rows_RD: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """y_TD = sum over k of weight * the row at inverse."""
        tokens, top_k = inverse_TK.shape
        if len(rows_RD) < inverse_TK.numel():  # the row that empty choices point at
            rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
        y_TKD = rows_RD.index_select(0, inverse_TK.reshape(-1)).view(tokens, top_k, rows_RD.shape[1])
        if weight_TK is not None:
            y_TKD.mul_(weight_TK.to(rows_RD.dtype)[:, :, None])
        return y_TKD.squeeze(1) if top_k == 1 else y_TKD.sum(1)

    def combine_backward(self, grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of the weights, both computed in sorted order."""
        grad_RD = self.gather(grad_TD, order_R, weight_TK.shape[1])
        products_R = torch.linalg.vecdot(grad_RD.to(weight_TK.dtype), rows_RD.to(weight_TK.dtype))
        grad_weight_R = products_R.new_zeros(weight_TK.numel()).scatter_(0, order_R, products_R)
        weight_R = weight_TK.reshape(-1).index_select(0, order_R).to(rows_RD.dtype)
        return grad_RD.mul_(weight_R[:, None]), grad_weight_R.view(weight_TK.shape)
