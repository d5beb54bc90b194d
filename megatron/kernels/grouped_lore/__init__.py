"""The up-projection of StructMoE: every row through its expert's matrix plus its low-rank experts (LoREs). The one place this op is defined.

Shapes:  R rows, sorted by expert;  E experts;  M LoREs per expert;  G = E*M LoREs, of rank Q;  D in;  F out;  L LoREs per row;  N = R*L LoRE rows,
         sorted by LoRE (key e*M + m).
    h_RF[r] = x_RD[r] @ weight_EFD[e]^T + sum over the LoREs g chosen for r of (pi * x_RD[r] @ a_GQD[g]^T) @ b_GQF[g]
which is equation 2 of the StructMoE paper, H = x W_up + sum_i (x pi_i A_i) B_i, with W_up and A stored transposed as linear layers are.

An implementation supplies the forward and the backward; it also returns u_NQ = x A, the only intermediate that the backward needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.kernels.grouped_lore.reference import Reference
from megatron.kernels.registry import Implementation, Op


class LoreRows(NamedTuple):
    """Which LoRE every row uses, and how strongly."""

    pi_N: Tensor
    """Weights pi of the LoRE rows, in LoRE order."""
    rows_G: Tensor
    """int64: LoRE rows of each LoRE; LoRE g belongs to expert g // M."""
    order_N: Tensor | None
    """int64: the flat choice r*L + l that stands at place n. None: LoRE row n is row n of x (L = 1 and x already in LoRE order)."""


class GroupedLore(Protocol):
    """What an implementation supplies."""

    def forward(self, x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, rows: LoreRows) -> tuple[Tensor, Tensor]:
        """(h_RF, u_NQ)."""
        ...

    def backward(self, grad_RF: Tensor, x_RD: Tensor, weights: tuple[Tensor, Tensor, Tensor], rows: LoreRows, u_NQ: Tensor) -> tuple[Tensor, ...]:
        """Gradients of (x_RD, weight_EFD, a_GQD, b_GQF, pi_N); `weights` are (weight_EFD, a_GQD, b_GQF)."""
        ...


OP = Op("grouped_lore")
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def grouped_lore(x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, rows: LoreRows, *, backend: str = "auto") -> Tensor:
    """h_RF as above. Raises ValueError on shapes that do not fit, KernelUnavailable where `backend` cannot run."""
    _check_weights(x_RD, weight_EFD, a_GQD, b_GQF)
    if rows.rows_G.shape != a_GQD.shape[:1]:
        raise ValueError(f"grouped_lore: row counts of shape {tuple(rows.rows_G.shape)} for {a_GQD.shape[0]} LoREs; give one count for each")
    total, count = x_RD.shape[0], rows.pi_N.shape[0]
    if (rows.order_N is None and count != total) or (total and count % total):
        raise ValueError(f"grouped_lore: {count} LoRE weights for {total} rows; every row has the same number of LoREs, and one without an order")
    lore_rows = [rows.rows_G] if rows.order_N is None else [rows.rows_G, rows.order_N]
    return _grouped_lore(x_RD, [weight_EFD, a_GQD, b_GQF], rows.pi_N, lore_rows, backend)[0]


def _check_weights(x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor) -> None:
    shapes = f"x {tuple(x_RD.shape)}, weight {tuple(weight_EFD.shape)}, a {tuple(a_GQD.shape)}, b {tuple(b_GQF.shape)}"
    if x_RD.ndim != 2 or {weight_EFD.ndim, a_GQD.ndim, b_GQF.ndim} != {3}:
        raise ValueError(f"grouped_lore: {shapes}: x must be [rows, in] and the weights three-dimensional")
    if not x_RD.shape[1] == weight_EFD.shape[2] == a_GQD.shape[2] or weight_EFD.shape[1] != b_GQF.shape[2] or a_GQD.shape[:2] != b_GQF.shape[:2]:
        raise ValueError(f"grouped_lore: {shapes} do not fit: weight is [experts, out, in], a [LoREs, rank, in], b [LoREs, rank, out]")
    if a_GQD.shape[0] % weight_EFD.shape[0]:
        raise ValueError(
            f"grouped_lore: {a_GQD.shape[0]} LoREs cannot be shared out among {weight_EFD.shape[0]} experts; every expert has the same number"
        )


@torch.library.custom_op("neox::grouped_lore", mutates_args=())
def _grouped_lore(x_RD: Tensor, weights: list[Tensor], pi_N: Tensor, lore_rows: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    weight_EFD, a_GQD, b_GQF = weights
    return OP.resolve(backend, x_RD.device.type).forward(x_RD, weight_EFD, a_GQD, b_GQF, _rows(pi_N, lore_rows))


@torch.library.custom_op("neox::grouped_lore_backward", mutates_args=())
def _grouped_lore_backward(
    saved: list[Tensor], weights: list[Tensor], pi_N: Tensor, lore_rows: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (grad_RF, x_RD, u_NQ), (weight_EFD, a_GQD, b_GQF) = saved, weights
    implementation = OP.resolve(backend, x_RD.device.type)
    return implementation.backward(grad_RF, x_RD, (weight_EFD, a_GQD, b_GQF), _rows(pi_N, lore_rows), u_NQ)


def _rows(pi_N: Tensor, lore_rows: list[Tensor]) -> LoreRows:
    """An op's schema takes lists of tensors only: counts and, where there is one, the order."""
    rows_G, *order = lore_rows
    return LoreRows(pi_N, rows_G, order[0] if order else None)


@_grouped_lore.register_fake
def _(x_RD: Tensor, weights: list[Tensor], pi_N: Tensor, lore_rows: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    weight_EFD, a_GQD, _b = weights
    return x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1]), x_RD.new_empty(pi_N.shape[0], a_GQD.shape[1])


@_grouped_lore_backward.register_fake
def _(
    saved: list[Tensor], weights: list[Tensor], pi_N: Tensor, lore_rows: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_a, grad_b, grad_pi = (given.new_empty(given.shape) for given in (saved[1], *weights, pi_N))
    return grad_x, grad_weight, grad_a, grad_b, grad_pi


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_RD, weights, pi_N, lore_rows, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, *weights, pi_N, output[1], *lore_rows)


def _backward(ctx: Any, grad_RF: Tensor | None, grad_u: None) -> tuple[Any, ...]:
    x_RD, weight_EFD, a_GQD, b_GQF, pi_N, u_NQ, *lore_rows = ctx.saved_tensors
    if grad_RF is None:
        return None, [None] * 3, None, [None] * len(lore_rows), None
    weights = [weight_EFD, a_GQD, b_GQF]
    grad_x, *grad_weights, grad_pi = _grouped_lore_backward([grad_RF, x_RD, u_NQ], weights, pi_N, lore_rows, ctx.backend)
    return grad_x, grad_weights, grad_pi, [None] * len(lore_rows), None


_grouped_lore.register_autograd(_backward, setup_context=_save)
