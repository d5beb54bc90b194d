"""The hidden layer of all experts in one op: projections, low-rank experts (LoREs), biases, activation, gate. The one place this op is defined.

Shapes:  R rows, sorted by expert;  E experts;  M LoREs per expert;  G = E*M LoREs, of rank Q;  D in;  F out;  L LoREs per row;
         N = R*L LoRE rows, sorted by LoRE (key e*M + m).
A projection of row r, whose expert is e, is
    p_RF[r] = x_RD[r] @ weight_EFD[e]^T + sum over the LoREs g chosen for r of (pi * x_RD[r] @ a_GQD[g]^T) @ b_GQF[g] + bias_EF[e]
which is equation 2 of the StructMoE paper, H = x W_up + sum_i (x pi_i A_i) B_i, with W_up and A stored transposed as linear layers are. The hidden
layer is
    hidden_RF = act(up)            or, with a gate,            hidden_RF = act(gate) * up
Each part of a projection may be absent. Without a weight it is a product of two thin matrices (CoSMoEs' weight-decomposed experts: G = E and no
choice); without factors it is the plain expert.

An implementation supplies the forward and the backward. Saved for the backward are the projections before the activation and u_NQ = x A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels import compiled, cuda_library, triton_kernels
from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.grouped_gemm.pytorch import unavailable
from megatron.kernels.grouped_lore.interface import GroupedLore, HiddenLayer, LoreChoice, Projection, Saved, projection_width
from megatron.kernels.grouped_lore.pytorch import LibraryCalls
from megatron.kernels.grouped_lore.reference import Reference
from megatron.kernels.operator import torch_operator
from megatron.kernels.permute import Order
from megatron.kernels.registry import Implementation, Op


def _compiled() -> GroupedLore:
    from megatron.kernels.grouped_lore.compiled import Compiled

    return Compiled()


def _cuda() -> GroupedLore:
    from megatron.kernels.grouped_lore.cuda import Cuda

    return Cuda()


def _triton() -> GroupedLore:
    from megatron.kernels.grouped_lore.triton import Triton

    return Triton()


OP: Op[GroupedLore] = Op("grouped_lore")
OP.register(compiled.implementation(_compiled))
OP.register(cuda_library.implementation(_cuda))
OP.register(Implementation("triton", triton_kernels.DEVICES, triton_kernels.unavailable, _triton))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))
OP.register(Implementation("torch", frozenset({"cpu", "cuda"}), unavailable, LibraryCalls))  # by name only, as in `grouped_gemm`


def grouped_lore(x_RD: Tensor, layer: HiddenLayer, *, backend: str = "auto") -> Tensor:
    """hidden_RF as above. Raises ValueError on shapes or names that do not fit, KernelUnavailable where `backend` cannot run."""
    _check(x_RD, layer)
    places = [*layer.up, *(layer.gate or Projection())]
    has_lores = places[1] is not None or places[5] is not None
    choice = [layer.choice.pi_RL, *layer.choice.order] if layer.choice is not None and has_lores else []
    parts = [t for t in places if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x_RD, *parts, *choice))
    there = [t is not None for t in places]
    hidden_RF: Tensor = _grouped_lore(x_RD, layer.rows_E, parts, there, choice, layer.activation, save, backend)[0]
    return hidden_RF


def _check(x_RD: Tensor, layer: HiddenLayer) -> None:
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"grouped_lore: there is no activation '{layer.activation}'; known: {', '.join(ACTIVATIONS)}")
    if x_RD.ndim != 2 or layer.rows_E.ndim != 1:
        raise ValueError(f"grouped_lore: x {tuple(x_RD.shape)} must be [rows, in] and the row counts {tuple(layer.rows_E.shape)} [experts]")
    widths = {_check_projection(x_RD, projection, layer) for projection in (layer.up, layer.gate) if projection is not None}
    if len(widths) > 1:
        raise ValueError(f"grouped_lore: up and gate have the widths {' and '.join(map(str, sorted(widths)))}; they must be equal")
    if layer.choice is not None:
        shapes = tuple(layer.choice.pi_RL.shape), tuple(layer.choice.order.inverse_TK.shape)
        if layer.choice.pi_RL.ndim != 2 or shapes[0] != shapes[1] or shapes[0][0] != x_RD.shape[0]:
            raise ValueError(f"grouped_lore: weights {shapes[0]} and order of {shapes[1]} for {x_RD.shape[0]} rows; both are [rows, LoREs per row]")


def _check_projection(x_RD: Tensor, projection: Projection, layer: HiddenLayer) -> int:
    """The width F."""
    weight_EFD, a_GQD, b_GQF, bias_EF = projection
    named = {"weight": weight_EFD, "a": a_GQD, "b": b_GQF, "bias": bias_EF}
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items() if t is not None)
    shapes = f"grouped_lore: x {tuple(x_RD.shape)}, {layer.rows_E.shape[0]} row counts, {shapes}"
    if (a_GQD is None) != (b_GQF is None) or (weight_EFD is None and a_GQD is None):
        raise ValueError(f"{shapes}: a projection needs a weight, or the factors a and b, or all three")
    if any(t is not None and t.ndim != 3 for t in (weight_EFD, a_GQD, b_GQF)) or (bias_EF is not None and bias_EF.ndim != 2):
        raise ValueError(f"{shapes}: weight, a and b must be three-dimensional and the bias two-dimensional")
    experts, width = layer.rows_E.shape[0], projection_width(projection)
    fits = weight_EFD is None or weight_EFD.shape == (experts, width, x_RD.shape[1])
    fits &= bias_EF is None or bias_EF.shape == (experts, width)
    fits &= a_GQD is None or b_GQF is None or (a_GQD.shape[2], b_GQF.shape[2], a_GQD.shape[:2]) == (x_RD.shape[1], width, b_GQF.shape[:2])
    if not fits:
        raise ValueError(
            f"{shapes} do not fit: weight is [experts, out, in], a [LoREs, rank, in], b [LoREs, rank, out], bias [experts, out]; one count per expert"
        )
    if a_GQD is not None:
        _check_lores(a_GQD.shape[0], layer)
    return width


def _check_lores(lores: int, layer: HiddenLayer) -> None:
    experts = layer.rows_E.shape[0]
    if layer.choice is None and lores != experts:
        raise ValueError(f"grouped_lore: {lores} LoREs for {experts} experts and no choice; without a choice every expert has one LoRE")
    if lores % max(1, experts):
        raise ValueError(f"grouped_lore: {lores} LoREs cannot be shared out among {experts} experts; every expert has the same number")
    if layer.choice is not None and layer.choice.order.rows_G.shape != (lores,):
        shape = tuple(layer.choice.order.rows_G.shape)
        raise ValueError(f"grouped_lore: row counts of shape {shape} for {lores} LoREs; give one count for each")


Parts = list[Tensor]
"""What is there of `Projection` of up and of gate, one after the other. Which of the eight places are there is said beside it."""


def _layer(rows_E: Tensor, parts: Parts, there: list[bool], choice: list[Tensor], activation: str) -> HiddenLayer:
    present = iter(parts)
    places = [next(present) if is_there else None for is_there in there]
    chosen = LoreChoice(choice[0], Order(*choice[1:])) if choice else None
    return HiddenLayer(rows_E, activation, Projection(*places[:4]), Projection(*places[4:]) if any(there[4:]) else None, chosen)


@torch_operator("neox::grouped_lore")
def _grouped_lore(
    x_RD: Tensor, rows_E: Tensor, parts: Parts, there: list[bool], choice: list[Tensor], activation: str, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`choice`: nothing, or pi_RL and the three of its `Order`."""
    layer = _layer(rows_E, parts, there, choice, activation)
    hidden_RF, saved = OP.resolve(backend, x_RD.device.type).forward(x_RD, layer, save=save)
    return hidden_RF, *saved


@torch_operator("neox::grouped_lore_backward")
def _grouped_lore_backward(
    given: list[Tensor], rows_E: Tensor, parts: Parts, there: list[bool], choice: list[Tensor], activation: str, backend: str
) -> list[Tensor]:
    """`given`: grad_RF, x_RD and the four of `Saved`. Returns the gradients of x, of the parts, and of pi where there is a choice."""
    grad_RF, x_RD, *saved = given
    layer = _layer(rows_E, parts, there, choice, activation)
    gradients = OP.resolve(backend, x_RD.device.type).backward(grad_RF, x_RD, layer, Saved(*saved))
    return [t for t in (gradients.x_RD, *gradients.up, *(gradients.gate or ()), gradients.pi_RL) if t is not None]


@torch.library.register_fake("neox::grouped_lore")
def _(
    x_RD: Tensor, rows_E: Tensor, parts: Parts, there: list[bool], choice: list[Tensor], activation: str, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layer, rows = _layer(rows_E, parts, there, choice, activation), x_RD.shape[0]
    shape = rows, projection_width(layer.up)
    shapes: list[tuple[int, ...]] = [(0,)] * 4
    if save:
        lore_rows = choice[0].numel() if choice else rows
        inner = [(0,) if p is None or p.a_GQD is None else (lore_rows, p.a_GQD.shape[1]) for p in (layer.up, layer.gate)]
        gated = layer.gate is not None
        shapes = [shape if gated or activation != "identity" else (0,), shape if gated else (0,), *inner]
    hidden_RF, up_RF, gate_RF, u_up, u_gate = (x_RD.new_empty(each) for each in (shape, *shapes))
    return hidden_RF, up_RF, gate_RF, u_up, u_gate


@torch.library.register_fake("neox::grouped_lore_backward")
def _(given: list[Tensor], rows_E: Tensor, parts: Parts, there: list[bool], choice: list[Tensor], activation: str, backend: str) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (given[1], *parts, *choice[:1])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_RD, rows_E, parts, ctx.there, choice, ctx.activation, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.num_parts = len(parts)
    ctx.save_for_backward(x_RD, rows_E, *output[1:], *parts, *choice)


def _backward(ctx: Any, grad_RF: Tensor | None, *_: None) -> tuple[Any, ...]:
    x_RD, rows_E, *rest = ctx.saved_tensors
    saved, parts, choice = rest[:4], rest[4 : 4 + ctx.num_parts], rest[4 + ctx.num_parts :]
    if grad_RF is None:
        return None, None, [None] * len(parts), None, [None] * len(choice), None, None, None
    grads = _grouped_lore_backward([grad_RF, x_RD, *saved], rows_E, parts, ctx.there, choice, ctx.activation, ctx.backend)
    grad_x, grad_parts, grad_pi = grads[0], grads[1 : 1 + len(parts)], grads[1 + len(parts) :]
    return grad_x, None, grad_parts, None, [*grad_pi, None, None, None] if choice else [], None, None, None


_grouped_lore.differentiate(_save, _backward)
