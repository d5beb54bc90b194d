"""Bring rows into the order of their groups, and back. The one place this op is defined.

Shapes:  T tokens;  K choices per token;  R routed rows, sorted by group (stable);  D width;  G groups.
    permute:  rows_RD[r] = x_TD[order_R[r] // K]
    combine:  y_TD[t] = sum_k weight_TK[t, k] * rows_RD[inverse_TK[t, k]]     (a weight of None is 1)
R = T*K, or less where choices may be empty: those stand at place R, one beyond the last row, and add nothing.

Both directions are gathers along a permutation and its inverse, forward and backward, so no atomic or unordered addition is
involved: results are the same bit for bit on every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.kernels import compiled, triton_kernels
from megatron.kernels.operator import torch_operator
from megatron.kernels.permute.reference import Reference
from megatron.kernels.registry import Implementation, Op


class Order(NamedTuple):
    """The sorted order of the choices by their group."""

    order_R: Tensor
    """int64: the flat choice t*K + k that stands at place r."""
    inverse_TK: Tensor
    """int64: the place at which choice (t, k) stands; R for an empty one."""
    rows_G: Tensor
    """int64: rows of each group."""


class Permute(Protocol):
    """What an implementation supplies. On CPUs it raises ValueError for an index out of range before anything is read there."""

    def sort(self, group_TK: Tensor, num_groups: int, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The three of `Order`. With `padded`, choices of group `num_groups` are empty."""
        ...

    def gather(self, x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        """rows_RD[r] = x_TD[order_R[r] // top_k]."""
        ...

    def combine(self, rows_RD: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """y_TD = sum over k of weight * the row at inverse."""
        ...

    def combine_backward(self, grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (of rows_RD, of weight in sorted order R)."""
        ...


def _compiled() -> Permute:
    from megatron.kernels.permute.compiled import Compiled

    return Compiled()


def _triton() -> Permute:
    from megatron.kernels.permute.triton import Triton

    return Triton()


OP: Op[Permute] = Op("permute")
OP.register(compiled.implementation(_compiled))
OP.register(Implementation("triton", triton_kernels.DEVICES, triton_kernels.unavailable, _triton))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def sort_by_group(group_TK: Tensor, num_groups: int, *, padded: bool = False, backend: str = "auto") -> Order:
    """Stable order of all choices by group; integers only, nothing to differentiate.

    With `padded`, group number `num_groups` marks an empty choice, which gets no row; how many rows remain has to be known on the host then. Without,
    nothing is transferred. Raises ValueError where groups are not int64 numbers from 0 to `num_groups` - 1; on a GPU that range is not checked.
    """
    if group_TK.dtype != torch.int64 or group_TK.ndim != 2 or num_groups < 0:
        raise ValueError(
            f"sort_by_group: groups {tuple(group_TK.shape)} of {group_TK.dtype} for {num_groups} groups; they must be int64, [tokens, choices]"
        )
    return Order(*_sort(group_TK, num_groups, padded, backend))


def permute(x_TD: Tensor, order: Order, *, backend: str = "auto") -> Tensor:
    """Copies of the tokens in group order, one for each choice. Raises ValueError where the order is not one of these tokens."""
    _check("permute", x_TD, order)
    if x_TD.shape[0] != order.inverse_TK.shape[0]:
        raise ValueError(f"permute: {x_TD.shape[0]} tokens for an order of {order.inverse_TK.shape[0]}; sort the choices of these tokens first")
    return _permute(x_TD, order.order_R, order.inverse_TK, backend)


def combine(rows_RD: Tensor, order: Order, weight_TK: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Back to token order, the K rows of a token summed with their weights (None: plain sum). Raises ValueError where the order is not of these rows.

    16-bit rows are summed in float32 and rounded once by compiled implementations.
    """
    _check("combine", rows_RD, order)
    if rows_RD.shape[0] != order.order_R.shape[0]:
        raise ValueError(f"combine: {rows_RD.shape[0]} rows for an order of {order.order_R.shape[0]}; give the rows that 'permute' returned")
    if weight_TK is None:
        return _combine(rows_RD, order.order_R, order.inverse_TK, backend)
    if weight_TK.shape != order.inverse_TK.shape:
        raise ValueError(f"combine: weights {tuple(weight_TK.shape)} for choices {tuple(order.inverse_TK.shape)}; give one weight for each choice")
    if weight_TK.device != rows_RD.device or not weight_TK.dtype.is_floating_point:
        raise ValueError(
            f"combine: weights of {weight_TK.dtype} on {weight_TK.device}; they must be floating-point numbers on {rows_RD.device}, as the rows"
        )
    return _weighted_combine(rows_RD, order.order_R, order.inverse_TK, weight_TK, backend)


def _check(what: str, rows: Tensor, order: Order) -> None:
    if rows.ndim != 2 or order.order_R.ndim != 1 or order.inverse_TK.ndim != 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in (rows, order.order_R, order.inverse_TK))
        raise ValueError(f"{what}: rows, order and inverse have the shapes {shapes}; they must be [rows, width], [rows] and [tokens, choices]")
    if not order.order_R.dtype == order.inverse_TK.dtype == torch.int64:
        raise ValueError(f"{what}: order of {order.order_R.dtype} and inverse of {order.inverse_TK.dtype}; both must be int64")
    if not order.order_R.device == order.inverse_TK.device == rows.device:
        raise ValueError(f"{what}: rows on {rows.device} and an order on {order.order_R.device} and {order.inverse_TK.device}; use one device")


@torch_operator("neox::sort_by_group")
def _sort(group_TK: Tensor, num_groups: int, padded: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return OP.resolve(backend, group_TK.device.type).sort(group_TK, num_groups, padded=padded)


@torch_operator("neox::permute")
def _permute(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, backend: str) -> Tensor:
    return OP.resolve(backend, x_TD.device.type).gather(x_TD, order_R, inverse_TK.shape[1])


@torch_operator("neox::combine")
def _combine(rows_RD: Tensor, order_R: Tensor, inverse_TK: Tensor, backend: str) -> Tensor:
    return OP.resolve(backend, rows_RD.device.type).combine(rows_RD, inverse_TK, None)


@torch_operator("neox::weighted_combine")
def _weighted_combine(rows_RD: Tensor, order_R: Tensor, inverse_TK: Tensor, weight_TK: Tensor, backend: str) -> Tensor:
    return OP.resolve(backend, rows_RD.device.type).combine(rows_RD, inverse_TK, weight_TK)


@torch_operator("neox::weighted_combine_backward")
def _weighted_combine_backward(grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return OP.resolve(backend, rows_RD.device.type).combine_backward(grad_TD, rows_RD, order_R, weight_TK)


@torch.library.register_fake("neox::sort_by_group")
def _(group_TK: Tensor, num_groups: int, padded: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if padded else group_TK.numel()
    return group_TK.new_empty(rows), torch.empty_like(group_TK, memory_format=torch.contiguous_format), group_TK.new_empty(num_groups)


@torch.library.register_fake("neox::permute")
def _(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, backend: str) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@torch.library.register_fake("neox::combine")
def _(rows_RD: Tensor, order_R: Tensor, inverse_TK: Tensor, backend: str) -> Tensor:
    return rows_RD.new_empty(inverse_TK.shape[0], rows_RD.shape[1])


@torch.library.register_fake("neox::weighted_combine")
def _(rows_RD: Tensor, order_R: Tensor, inverse_TK: Tensor, weight_TK: Tensor, backend: str) -> Tensor:
    return rows_RD.new_empty(inverse_TK.shape[0], rows_RD.shape[1])


@torch.library.register_fake("neox::weighted_combine_backward")
def _(grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weight_TK: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RD), weight_TK.new_empty(weight_TK.shape)


def _save_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order_R, inverse_TK, ctx.backend = inputs
    ctx.save_for_backward(order_R, inverse_TK)


def _permute_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return _combine(grad_RD, *ctx.saved_tensors, ctx.backend), None, None, None


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return _permute(grad_TD, *ctx.saved_tensors, ctx.backend), None, None, None


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, order_R, _, weight_TK, ctx.backend = inputs
    ctx.save_for_backward(rows_RD, order_R, weight_TK)


def _weighted_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows, grad_weight = _weighted_combine_backward(grad_TD, *ctx.saved_tensors, ctx.backend)
    return grad_rows, None, None, grad_weight, None


_permute.differentiate(_save_order, _permute_backward)
_combine.differentiate(_save_order, _combine_backward)
_weighted_combine.differentiate(_save_weighted, _weighted_backward)
