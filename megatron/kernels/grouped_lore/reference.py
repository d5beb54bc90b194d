"""The hidden layer of the experts as a loop over experts and LoREs: any device, any dtype; the definition that the others are tested against.

Shapes as in the package's docstring. The rows of x keep their place, so an expert's own product is the plain MoE's bit for bit; what the LoREs add is
computed one expert at a time, while its rows are in the cache. Every product is written straight into its place in one preallocated result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.grouped_gemm.reference import matmul_into, outer_into, row_counts, widened
from megatron.kernels.grouped_lore.interface import Gradients, HiddenLayer, LoreChoice, Projection, Saved, projection_width


class Part(NamedTuple):
    """What belongs to one expert."""

    expert: int
    rows: slice
    """Its rows of x."""
    lores: slice
    """Its LoREs."""
    counts: list[int]
    """Rows of each of them."""
    lore_rows: slice
    """Its LoRE rows."""


class Reference:
    """The loop, forward and backward."""

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs)."""
        act, (no_up, no_gate, no_u_up, no_u_gate) = ACTIVATIONS[layer.activation].value, (x_RD.new_empty(0) for _ in range(4))
        up_RF, u_up_NQ = _project(x_RD, layer.up, layer)
        if layer.gate is None:
            hidden_RF = act(up_RF)
            saved = Saved(no_up if layer.activation == "identity" else up_RF, no_gate, u_up_NQ, no_u_gate)
        else:
            gate_RF, u_gate_NQ = _project(x_RD, layer.gate, layer)
            hidden_RF = act(gate_RF) * up_RF
            saved = Saved(up_RF, gate_RF, u_up_NQ, u_gate_NQ)
        return hidden_RF, saved if save else Saved(no_up, no_gate, no_u_up, no_u_gate)

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients of everything that is there."""
        act, act_backward = ACTIVATIONS[layer.activation]
        if layer.gate is None:
            grad_up = grad_RF if layer.activation == "identity" else act_backward(grad_RF, saved.up_RF)
            grad_x, up, grad_pi = _project_backward(grad_up, x_RD, layer.up, layer, saved.u_up_NQ)
            return Gradients(grad_x, up, None, grad_pi)
        grad_x, up, grad_pi = _project_backward(grad_RF * act(saved.gate_RF), x_RD, layer.up, layer, saved.u_up_NQ)
        grad_gate = act_backward(grad_RF * saved.up_RF, saved.gate_RF)
        grad_x_gate, gate, grad_pi_gate = _project_backward(grad_gate, x_RD, layer.gate, layer, saved.u_gate_NQ)
        if grad_pi is not None and grad_pi_gate is not None:
            grad_pi = grad_pi + grad_pi_gate
        return Gradients(grad_x.add_(grad_x_gate), up, gate, grad_pi_gate if grad_pi is None else grad_pi)


def _project(x_RD: Tensor, projection: Projection, layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """(p_RF, u_NQ); u is empty without LoREs."""
    dtype, lores = x_RD.dtype, projection.a_GQD is not None
    x_RD, weight_EFD, a_GQD, b_GQF, bias_EF = _widened(x_RD, *projection)
    groups = _groups(x_RD, projection, layer)
    p_RF = x_RD.new_empty(x_RD.shape[0], projection_width(projection))
    u_NQ = x_RD.new_empty(sum(groups), a_GQD.shape[1]) if lores else x_RD.new_empty(0)
    z_NQ = u_NQ
    if lores:
        matmul_into(u_NQ, x_RD if layer.choice is None else x_RD.index_select(0, _sources(layer.choice)), a_GQD.mT.unbind(), groups)
        z_NQ = u_NQ if layer.choice is None else u_NQ * _weights(layer.choice, u_NQ.dtype)
    for part in parts(groups, layer):
        p_rF = p_RF[part.rows]
        if projection.weight_EFD is None:
            p_rF.zero_()
        else:
            torch.mm(x_RD[part.rows], weight_EFD[part.expert].t(), out=p_rF)
        if lores:
            y_nF = p_RF.new_empty(sum(part.counts), p_RF.shape[1])
            matmul_into(y_nF, z_NQ[part.lore_rows], b_GQF.unbind()[part.lores], part.counts)
            _add_rows(p_rF, y_nF, layer.choice, part)
        if projection.bias_EF is not None:
            p_rF.add_(bias_EF[part.expert])
    return p_RF.to(dtype), u_NQ.to(dtype)


def _project_backward(
    grad_RF: Tensor, x_RD: Tensor, projection: Projection, layer: HiddenLayer, u_NQ: Tensor
) -> tuple[Tensor, Projection, Tensor | None]:
    """Gradients of (x, the projection's parts, pi)."""
    dtype, lores, pi_RL = x_RD.dtype, projection.a_GQD is not None, None if layer.choice is None else layer.choice.pi_RL
    grad_RF, x_RD, u_NQ, weight_EFD, a_GQD, b_GQF, _ = _widened(grad_RF, x_RD, u_NQ, *projection)
    groups = _groups(x_RD, projection, layer)
    grads = [None if t is None else torch.zeros(t.shape, dtype=x_RD.dtype, device=x_RD.device) for t in projection]
    grad_weight, grad_a, grad_b, grad_bias = grads
    grad_x = torch.zeros(x_RD.shape, dtype=x_RD.dtype, device=x_RD.device)
    pi_N1 = None if layer.choice is None or not lores else _weights(layer.choice, u_NQ.dtype)
    z_NQ, grad_z_NQ = u_NQ if pi_N1 is None else u_NQ * pi_N1, torch.empty_like(u_NQ)
    for part in parts(groups, layer):
        grad_rF = grad_RF[part.rows]
        if grad_weight is not None:
            torch.mm(grad_rF, weight_EFD[part.expert], out=grad_x[part.rows])
            torch.mm(grad_rF.t(), x_RD[part.rows], out=grad_weight[part.expert])
        if grad_bias is not None:
            grad_bias[part.expert] = grad_rF.sum(0)
        if grad_b is not None:
            grad_nF = grad_rF if layer.choice is None else grad_rF.index_select(0, _sources(layer.choice)[part.lore_rows] - part.rows.start)
            outer_into(grad_b[part.lores], z_NQ[part.lore_rows], grad_nF, part.counts)
            matmul_into(grad_z_NQ[part.lore_rows], grad_nF, b_GQF.mT.unbind()[part.lores], part.counts)
    grad_pi_RL = None
    if grad_a is not None:
        if layer.choice is not None and pi_RL is not None and pi_N1 is not None:
            product_N = torch.linalg.vecdot(grad_z_NQ.to(pi_RL.dtype), u_NQ.to(pi_RL.dtype))
            grad_pi_RL = torch.empty_like(product_N).scatter_(0, layer.choice.order.order_R, product_N).view(pi_RL.shape)
            grad_z_NQ.mul_(pi_N1)
        outer_into(grad_a, grad_z_NQ, x_RD if layer.choice is None else x_RD.index_select(0, _sources(layer.choice)), groups)
        y_ND = x_RD.new_empty(len(grad_z_NQ), x_RD.shape[1])
        matmul_into(y_ND, grad_z_NQ, a_GQD.unbind(), groups)
        grad_x.add_(y_ND) if layer.choice is None else _scatter_rows(grad_x, y_ND, layer.choice.order.inverse_TK)
    return grad_x.to(dtype), Projection(*(None if g is None else g.to(dtype) for g in grads)), grad_pi_RL


def parts(groups: list[int], layer: HiddenLayer) -> Iterator[Part]:
    """The experts in order; both the rows of x and the LoRE rows are sorted by expert."""
    rows = layer.rows_E.tolist()
    per_expert = len(groups) // max(1, len(rows))
    row = lore_row = 0
    for expert, count in enumerate(rows):
        lores = slice(expert * per_expert, (expert + 1) * per_expert)
        lore_count = sum(groups[lores])
        yield Part(expert, slice(row, row + count), lores, groups[lores], slice(lore_row, lore_row + lore_count))
        row, lore_row = row + count, lore_row + lore_count


def _groups(x_RD: Tensor, projection: Projection, layer: HiddenLayer) -> list[int]:
    """Rows of each LoRE; none without LoREs. Raises ValueError for counts that do not sum to the rows."""
    rows = row_counts(layer.rows_E, x_RD.shape[0])
    if projection.a_GQD is None:
        return []
    return rows if layer.choice is None else row_counts(layer.choice.order.rows_G, layer.choice.pi_RL.numel())


def _widened(*given: Tensor | None) -> tuple[Tensor, ...]:
    """In the dtype that the device multiplies in; an absent one becomes an empty tensor that nothing reads."""
    return widened(*(torch.empty(0) if t is None else t for t in given))


def _sources(choice: LoreChoice) -> Tensor:
    """int64: the row of x that each LoRE row uses."""
    per_row = choice.pi_RL.shape[1]
    return choice.order.order_R if per_row == 1 else choice.order.order_R // per_row


def _weights(choice: LoreChoice, dtype: torch.dtype) -> Tensor:
    """pi_N1 in LoRE order."""
    return choice.pi_RL.reshape(-1).index_select(0, choice.order.order_R).to(dtype)[:, None]


def _add_rows(p_rF: Tensor, y_nF: Tensor, choice: LoreChoice | None, part: Part) -> None:
    """Adds the LoREs' products to the rows of one expert."""
    if choice is None:
        p_rF.add_(y_nF)
    else:
        _scatter_rows(p_rF, y_nF, choice.order.inverse_TK[part.rows] - part.lore_rows.start)


def _scatter_rows(out_RF: Tensor, y_NF: Tensor, place_RL: Tensor) -> None:
    """out[r] += sum over l of y[place[r, l]]."""
    rows_NF = y_NF.index_select(0, place_RL.reshape(-1))
    out_RF.add_(rows_NF if place_RL.shape[1] == 1 else rows_NF.view(*place_RL.shape, y_NF.shape[1]).sum(1))
