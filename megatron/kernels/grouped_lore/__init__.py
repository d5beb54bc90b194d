"""The up-projection of StructMoE: every row through its expert's matrix plus its low-rank experts (LoREs). The one place this op is defined.

Shapes:  R rows, sorted by expert;  E experts;  M LoREs per expert;  G = E*M LoREs, of rank Q;  D in;  F out;  L LoREs per row;
         N = R*L LoRE rows, sorted by LoRE (key e*M + m).
    h_RF[r] = x_RD[r] @ weight_EFD[e]^T + sum over the LoREs g chosen for r of (pi * x_RD[r] @ a_GQD[g]^T) @ b_GQF[g]
which is equation 2 of the StructMoE paper, H = x W_up + sum_i (x pi_i A_i) B_i, with W_up and A stored transposed as linear layers are.

An implementation supplies the forward and the backward; it also returns u_NQ = x A, the only intermediate that the backward needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.kernels.grouped_lore.reference import Reference
from megatron.kernels.permute import Order
from megatron.kernels.registry import Implementation, Op, torch_operator


class LoreChoice(NamedTuple):
    """Which LoREs every row uses, and how strongly."""

    pi_RL: Tensor
    """Weights pi of each row's LoREs."""
    order: Order
    """The R*L choices sorted by LoRE: `sort_by_group(e*M + m)`. LoRE g belongs to expert g // M, so the order keeps experts together."""


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class GroupedLore(Protocol):
    """What an implementation supplies."""

    def forward(self, x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, choice: LoreChoice) -> tuple[Tensor, Tensor]:
        """(h_RF, u_NQ)."""
        ...

    def backward(self, grad_RF: Tensor, x_RD: Tensor, weights: tuple[Tensor, Tensor, Tensor], choice: LoreChoice, u_NQ: Tensor) -> Gradients:
        """Gradients of (x_RD, weight_EFD, a_GQD, b_GQF, pi_RL); `weights` are (weight_EFD, a_GQD, b_GQF)."""
        ...


OP: Op[GroupedLore] = Op("grouped_lore")
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def grouped_lore(x_RD: Tensor, weight_EFD: Tensor, a_GQD: Tensor, b_GQF: Tensor, choice: LoreChoice, *, backend: str = "auto") -> Tensor:
    """h_RF as above. Raises ValueError on shapes that do not fit, KernelUnavailable where `backend` cannot run."""
    _check_weights(x_RD, weight_EFD, a_GQD, b_GQF)
    rows_G = choice.order.rows_G
    if rows_G.shape != a_GQD.shape[:1]:
        raise ValueError(f"grouped_lore: row counts of shape {tuple(rows_G.shape)} for {a_GQD.shape[0]} LoREs; give one count for each")
    shapes = tuple(choice.pi_RL.shape), tuple(choice.order.inverse_TK.shape)
    if choice.pi_RL.ndim != 2 or shapes[0] != shapes[1] or shapes[0][0] != x_RD.shape[0]:
        raise ValueError(f"grouped_lore: weights {shapes[0]} and order of {shapes[1]} for {x_RD.shape[0]} rows; both are [rows, LoREs per row]")
    return _grouped_lore(x_RD, [weight_EFD, a_GQD, b_GQF], choice.pi_RL, list(choice.order), backend)[0]


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


@torch_operator("neox::grouped_lore")
def _grouped_lore(x_RD: Tensor, weights: list[Tensor], pi_RL: Tensor, order: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    weight_EFD, a_GQD, b_GQF = weights
    return OP.resolve(backend, x_RD.device.type).forward(x_RD, weight_EFD, a_GQD, b_GQF, LoreChoice(pi_RL, Order(*order)))


@torch_operator("neox::grouped_lore_backward")
def _grouped_lore_backward(saved: list[Tensor], weights: list[Tensor], pi_RL: Tensor, order: list[Tensor], backend: str) -> Gradients:
    (grad_RF, x_RD, u_NQ), (weight_EFD, a_GQD, b_GQF) = saved, weights
    implementation = OP.resolve(backend, x_RD.device.type)
    return implementation.backward(grad_RF, x_RD, (weight_EFD, a_GQD, b_GQF), LoreChoice(pi_RL, Order(*order)), u_NQ)


@torch.library.register_fake("neox::grouped_lore")
def _(x_RD: Tensor, weights: list[Tensor], pi_RL: Tensor, order: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    weight_EFD, a_GQD, _b = weights
    return x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1]), x_RD.new_empty(pi_RL.numel(), a_GQD.shape[1])


@torch.library.register_fake("neox::grouped_lore_backward")
def _(saved: list[Tensor], weights: list[Tensor], pi_RL: Tensor, order: list[Tensor], backend: str) -> Gradients:
    grad_x, grad_weight, grad_a, grad_b, grad_pi = (given.new_empty(given.shape) for given in (saved[1], *weights, pi_RL))
    return grad_x, grad_weight, grad_a, grad_b, grad_pi


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_RD, weights, pi_RL, order, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, *weights, pi_RL, output[1], *order)


def _backward(ctx: Any, grad_RF: Tensor | None, grad_u: None) -> tuple[Any, ...]:
    x_RD, weight_EFD, a_GQD, b_GQF, pi_RL, u_NQ, *order = ctx.saved_tensors
    if grad_RF is None:
        return None, [None] * 3, None, [None] * 3, None
    weights = [weight_EFD, a_GQD, b_GQF]
    grad_x, *grad_weights, grad_pi = _grouped_lore_backward([grad_RF, x_RD, u_NQ], weights, pi_RL, order, ctx.backend)
    return grad_x, grad_weights, grad_pi, [None] * 3, None


torch.library.register_autograd("neox::grouped_lore", _backward, setup_context=_save)
