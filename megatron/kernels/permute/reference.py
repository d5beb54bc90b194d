"""Row permutation by `index_select`: any device, any dtype; the definition that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_group(group: int, num_groups: int, *, padded: bool) -> None:
    """Raises the ValueError for a group out of range."""
    empty = f", or {num_groups} for an empty choice" if padded else ""
    raise ValueError(f"sort_by_group: there is no group {group}; groups are 0 to {num_groups - 1}{empty}")


def refuse_index(what: str, index: int, end: int) -> None:
    """Raises the ValueError for an index out of range."""
    raise ValueError(f"{what}: the order holds {index}, which is not 0 to {end - 1}; use an order of 'sort_by_group' for these rows")


class Reference:
    """Gathers along the permutation and its inverse. Indices are checked on CPUs; a GPU's own checks stop it at a wrong one."""

    def sort(self, group_TK: Tensor, num_groups: int, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(order_R, inverse_TK, rows_G)."""
        flat_N = group_TK.reshape(-1)
        if (wrong := outside(flat_N, num_groups + padded)) is not None:
            refuse_group(wrong, num_groups, padded=padded)
        sorted_N, order_N = torch.sort(flat_N, stable=True)
        inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        rows_G = torch.searchsorted(sorted_N, torch.arange(num_groups + 1, device=flat_N.device)).diff()  # bincount would wait for the device
        if not padded:
            return order_N, inverse_N.view(group_TK.shape), rows_G
        routed = int(rows_G.sum())
        return order_N[:routed], inverse_N.clamp(max=routed).view(group_TK.shape), rows_G

    def gather(self, x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        """rows_RD[r] = x_TD[order_R[r] // top_k]."""
        _check("permute", order_R, len(x_TD) * top_k)
        return x_TD.index_select(0, order_R if top_k == 1 else order_R // top_k)

    def combine(self, rows_RD: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """y_TD = sum over k of weight * the row at inverse."""
        tokens, top_k = inverse_TK.shape
        if len(rows_RD) < inverse_TK.numel():  # the row that empty choices point at
            rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
        _check("combine", inverse_TK, len(rows_RD))
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


def outside(index: Tensor, end: int) -> int | None:
    """An index that is not 0 to `end` - 1. None: there is none, or the index is not on the CPU, where looking would wait for the device."""
    if index.device.type != "cpu" or not index.numel():
        return None
    smallest, largest = (int(t) for t in torch.aminmax(index))
    return smallest if smallest < 0 else largest if largest >= end else None


def _check(what: str, index: Tensor, end: int) -> None:
    if (wrong := outside(index, end)) is not None:
        refuse_index(what, wrong, end)
