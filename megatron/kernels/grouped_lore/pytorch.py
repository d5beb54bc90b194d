"""The hidden layer of the experts by three library calls for each projection: x W^T, z = pi (x A), z B. CPU and CUDA.

Shapes as in the package's docstring. The calls are those of `grouped_gemm.pytorch`, with its limits. This is what can be had without kernels of our
own; ours are measured against it. In 16 bits each product is rounded before the sum, where the processor has 16-bit instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.grouped_gemm.pytorch import outer_product, product
from megatron.kernels.grouped_gemm.reference import widened
from megatron.kernels.grouped_lore.interface import Gradients, HiddenLayer, LoreChoice, Projection, Saved
from megatron.kernels.grouped_lore.reference import Reference
from megatron.kernels.permute.reference import Reference as Rows


class LibraryCalls:
    """Forward and backward."""

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs)."""
        if x_RD.dtype == torch.float64:
            return Reference().forward(x_RD, layer, save=save)
        act, nothing = ACTIVATIONS[layer.activation].value, Saved(*(x_RD.new_empty(0) for _ in range(4)))
        up_RF, u_up_NQ = _project(x_RD, layer.up, layer)
        if layer.gate is None:
            saved = nothing._replace(u_up_NQ=u_up_NQ) if layer.activation == "identity" else nothing._replace(up_RF=up_RF, u_up_NQ=u_up_NQ)
            return act(up_RF), saved if save else nothing
        gate_RF, u_gate_NQ = _project(x_RD, layer.gate, layer)
        return act(gate_RF) * up_RF, Saved(up_RF, gate_RF, u_up_NQ, u_gate_NQ) if save else nothing

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients of everything that is there."""
        if x_RD.dtype == torch.float64:
            return Reference().backward(grad_RF, x_RD, layer, saved)
        act, act_backward = ACTIVATIONS[layer.activation]
        if layer.gate is None:
            grad_up = grad_RF if layer.activation == "identity" else act_backward(grad_RF, saved.up_RF)
            up = _project_backward(grad_up, x_RD, layer.up, layer, saved.u_up_NQ)
            return Gradients(up.x_RD, up.projection, None, up.pi_RL)
        up = _project_backward(grad_RF * act(saved.gate_RF), x_RD, layer.up, layer, saved.u_up_NQ)
        gate = _project_backward(act_backward(grad_RF * saved.up_RF, saved.gate_RF), x_RD, layer.gate, layer, saved.u_gate_NQ)
        pi = [each.pi_RL for each in (up, gate) if each.pi_RL is not None]
        return Gradients(up.x_RD + gate.x_RD, up.projection, gate.projection, sum(pi[1:], pi[0]) if pi else None)


class ProjectionGradients(NamedTuple):
    """What one projection gives back."""

    x_RD: Tensor
    projection: Projection
    pi_RL: Tensor | None
    """None: no LoREs, or no choice."""


def _project(x_RD: Tensor, projection: Projection, layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """(p_RF, u_NQ); u is empty without LoREs."""
    dtype, parts, rows_E = x_RD.dtype, [], layer.rows_E
    u_NQ = x_RD.new_empty(0)
    x_RD = _wide(x_RD)
    if projection.weight_EFD is not None:
        parts.append(product(x_RD, _turned(projection.weight_EFD), rows_E))
    if projection.a_GQD is not None and projection.b_GQF is not None:
        u_NQ = product(_to_lores(x_RD, layer.choice), _turned(projection.a_GQD), _rows_of_lores(layer))
        y_NF = product(_weighted(u_NQ, layer.choice), _wide(projection.b_GQF), _rows_of_lores(layer))
        parts.append(_from_lores(y_NF, layer.choice))
    if projection.bias_EF is not None:
        parts.append(projection.bias_EF.to(x_RD.dtype).repeat_interleave(rows_E, dim=0, output_size=x_RD.shape[0]))
    return sum(parts[1:], parts[0]).to(dtype), u_NQ.to(dtype)


def _project_backward(grad_RF: Tensor, x_RD: Tensor, projection: Projection, layer: HiddenLayer, u_NQ: Tensor) -> ProjectionGradients:
    dtype, rows_E, grad_pi_RL = x_RD.dtype, layer.rows_E, None
    grad_RF, x_RD, u_NQ = widened(grad_RF, x_RD, u_NQ)
    weight_EFD, a_GQD, b_GQF, bias_EF = projection
    grad_x, grad_weight, grad_a, grad_b, grad_bias = torch.zeros_like(x_RD), None, None, None, None
    if weight_EFD is not None:
        grad_x, grad_weight = product(grad_RF, _wide(weight_EFD), rows_E), outer_product(grad_RF, x_RD, rows_E)
    if a_GQD is not None and b_GQF is not None:
        rows_G, grad_NF, x_ND = _rows_of_lores(layer), _to_lores(grad_RF, layer.choice), _to_lores(x_RD, layer.choice)
        grad_z_NQ = product(grad_NF, _turned(b_GQF), rows_G)
        grad_u_NQ = _weighted(grad_z_NQ, layer.choice)
        grad_a, grad_b = outer_product(grad_u_NQ, x_ND, rows_G), outer_product(_weighted(u_NQ, layer.choice), grad_NF, rows_G)
        grad_x = grad_x + _from_lores(product(grad_u_NQ, _wide(a_GQD), rows_G), layer.choice)
        grad_pi_RL = None if layer.choice is None else _pi_gradient(grad_z_NQ, u_NQ, layer.choice)
    if bias_EF is not None:
        grad_bias = outer_product(x_RD.new_ones(x_RD.shape[0], 1), grad_RF, rows_E).squeeze(1)
    gradients = (grad_weight, grad_a, grad_b, grad_bias)
    return ProjectionGradients(grad_x.to(dtype), Projection(*(None if g is None else g.to(dtype) for g in gradients)), grad_pi_RL)


def _wide(weight: Tensor) -> Tensor:
    """In the dtype of the products."""
    return widened(weight)[0]


def _turned(weight_EFD: Tensor) -> Tensor:
    return _wide(weight_EFD).mT


def _rows_of_lores(layer: HiddenLayer) -> Tensor:
    """rows_G; without a choice every expert has one LoRE for all its rows."""
    return layer.rows_E if layer.choice is None else layer.choice.order.rows_G


def _to_lores(rows_RD: Tensor, choice: LoreChoice | None) -> Tensor:
    return rows_RD if choice is None else Rows().gather(rows_RD, choice.order.order_R, choice.pi_RL.shape[1])


def _from_lores(rows_ND: Tensor, choice: LoreChoice | None) -> Tensor:
    return rows_ND if choice is None else Rows().combine(rows_ND, choice.order.inverse_TK, None)


def _weighted(u_NQ: Tensor, choice: LoreChoice | None) -> Tensor:
    """pi times u."""
    return u_NQ if choice is None else u_NQ * choice.pi_RL.reshape(-1).index_select(0, choice.order.order_R).to(u_NQ.dtype)[:, None]


def _pi_gradient(grad_z_NQ: Tensor, u_NQ: Tensor, choice: LoreChoice) -> Tensor:
    product_N = torch.linalg.vecdot(grad_z_NQ.to(choice.pi_RL.dtype), u_NQ.to(choice.pi_RL.dtype))
    return torch.empty_like(product_N).scatter_(0, choice.order.order_R, product_N).view(choice.pi_RL.shape)
