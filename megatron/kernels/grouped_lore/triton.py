"""The hidden layer of the experts in Triton: bias, LoREs, activation and gate in the launch of the expert's own product.

Shapes as in the package's docstring. With one LoRE per row, the tiles of a product take their rows in LoRE order, so that a tile meets the LoREs of
neighbours only. With more, rows keep their place, and a tile takes one step for each LoRE that its rows use.
The gate's launch multiplies by `up`, which the launch before it wrote. Gradients of parameters come from `outer`, whose sums have a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.grouped_lore.interface import Gradients, HiddenLayer, LoreChoice, Projection, Saved, projection_width
from megatron.kernels.triton_kernels import hidden as kernels
from megatron.kernels.triton_kernels.blocks import Blocks, average, blocks_for, cdiv, launch, precision
from megatron.kernels.triton_kernels.grouped import Source, accumulator, matmul, outer, sum_rows
from megatron.kernels.triton_kernels.schedule import Schedule, bounds, check_counts, check_same, schedule


class Chosen(NamedTuple):
    """A choice, as the kernels read it."""

    pi_RL: Tensor
    order_N: Tensor
    place_RL: Tensor
    rows_G: Tensor
    lore_N: Tensor
    """int32: the LoRE that stands at each place."""


class Rows(NamedTuple):
    """What is the same for all projections of a call."""

    x_RD: Tensor
    rows_E: Tensor
    blocks: Blocks
    plan: Schedule
    chosen: Chosen | None
    """None: without a choice."""


class Factors(NamedTuple):
    """The LoREs' part of a product: (pi * u) @ factor, with the factor as a [LoREs, rank, columns] view."""

    u_NQ: Tensor
    factor_GQN: Tensor


class Epilogue(NamedTuple):
    """What happens to the sums before they are stored."""

    bias_EN: Tensor | None = None
    activation: str = "identity"
    other_RN: Tensor | None = None
    """Multiplied with, or added to, the result; None: neither."""
    plus: bool = False
    """Whether `other_RN` is added."""
    before: bool = False
    """Whether the sums before the activation are wanted too."""


class Triton:
    """Forward and backward."""

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs)."""
        rows = _rows(x_RD.contiguous(), layer, projection_width(layer.up))
        nothing = x_RD.new_empty(0)
        up, gate = layer.up, layer.gate
        u_up = _u(rows, up)
        if gate is None:
            keep = save and layer.activation != "identity"
            hidden_RF, up_RF = _project(rows, up.weight_EFD, _b(u_up, up), Epilogue(up.bias_EF, layer.activation, before=keep))
            return hidden_RF, Saved(up_RF if keep else nothing, nothing, u_up if save else nothing, nothing)
        u_gate = _u(rows, gate)
        up_RF, _ = _project(rows, up.weight_EFD, _b(u_up, up), Epilogue(up.bias_EF))
        hidden_RF, gate_RF = _project(rows, gate.weight_EFD, _b(u_gate, gate), Epilogue(gate.bias_EF, layer.activation, up_RF, before=save))
        return hidden_RF, Saved(up_RF, gate_RF, u_up, u_gate) if save else Saved(nothing, nothing, nothing, nothing)

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients of everything that is there."""
        rows = _rows(x_RD.contiguous(), layer, x_RD.shape[1])
        grad_RF = grad_RF.contiguous()
        check_same("grouped_lore", x_RD, gradient=grad_RF)
        if layer.gate is None:
            grad_up = grad_RF if layer.activation == "identity" else _activation_backward(grad_RF, saved.up_RF, None, layer.activation)[0]
            grad_x, up, grad_pi = _project_backward(rows, grad_up, layer.up, saved.u_up_NQ, None)
            return Gradients(grad_x.to(x_RD.dtype), up, None, grad_pi)
        grad_up, grad_gate = _activation_backward(grad_RF, saved.up_RF, saved.gate_RF, layer.activation)
        wide = torch.promote_types(x_RD.dtype, torch.float32)  # the sum of both projections is rounded once
        before, up, grad_pi = _project_backward(rows, grad_up, layer.up, saved.u_up_NQ, None, wide)
        grad_x, gate, grad_pi_gate = _project_backward(rows, grad_gate, layer.gate, saved.u_gate_NQ, before)
        if grad_pi is not None and grad_pi_gate is not None:
            grad_pi = grad_pi + grad_pi_gate
        return Gradients(grad_x, up, gate, grad_pi_gate if grad_pi is None else grad_pi)


def _rows(x_RD: Tensor, layer: HiddenLayer, columns: int) -> Rows:
    """Checks the input and lays out the tiles for a product with that many columns."""
    for projection in (layer.up, layer.gate or Projection()):
        check_same("grouped_lore", x_RD, **projection._asdict())
    total, experts = x_RD.shape[0], layer.rows_E.shape[0]
    check_counts(layer.rows_E, total)
    blocks = blocks_for(x_RD, average(total, experts), columns)
    if layer.choice is not None and (layer.gate is not None or layer.choice.pi_RL.shape[1] > 1):
        # A larger accumulator leaves no registers for several LoREs a row, or for the gate's epilogue.
        blocks = blocks._replace(columns=64) if blocks.warps == 8 else blocks._replace(rows=min(blocks.rows, 32 if x_RD.element_size() == 4 else 128))
    plan = schedule(layer.rows_E, total, blocks.rows)
    return Rows(x_RD, layer.rows_E, blocks, plan, None if layer.choice is None else _chosen(layer.choice, layer.rows_E))


def _chosen(choice: LoreChoice, rows_E: Tensor) -> Chosen:
    order, (rows, per_row) = choice.order, choice.pi_RL.shape
    check_counts(order.rows_G, rows * per_row)
    if order.rows_G.device.type != "cpu":
        per_expert = order.rows_G.view(len(rows_E), -1).sum(1)
        torch._assert_async((per_expert == rows_E * per_row).all(), "the LoREs' row counts must sum to those of their experts")
    ends_G = bounds(order.rows_G, rows * per_row)[1:]
    lore_N = torch.searchsorted(ends_G, torch.arange(rows * per_row, device=ends_G.device), right=True).to(torch.int32)
    return Chosen(choice.pi_RL.contiguous(), order.order_R.contiguous(), order.inverse_TK.contiguous(), order.rows_G, lore_N)


def _u(rows: Rows, projection: Projection) -> Tensor:
    """u_NQ = x A in LoRE order; empty without LoREs."""
    if projection.a_GQD is None:
        return rows.x_RD.new_empty(0)
    return matmul(_in_lore_order(rows, rows.x_RD), projection.a_GQD.mT, _lore_counts(rows))


def _in_lore_order(rows: Rows, t_RX: Tensor) -> Source:
    return Source(t_RX) if rows.chosen is None else Source(t_RX, rows.chosen.order_N, rows.chosen.pi_RL.shape[1])


def _lore_counts(rows: Rows) -> Tensor:
    return rows.rows_E if rows.chosen is None else rows.chosen.rows_G


def _b(u_NQ: Tensor, projection: Projection) -> Factors | None:
    return None if projection.b_GQF is None else Factors(u_NQ, projection.b_GQF)


def _project(
    rows: Rows, weight_ENK: Tensor | None, factors: Factors | None, epilogue: Epilogue, x_RK: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(the result, the sums before the activation or an empty tensor). None for `x_RK`: the rows' own x; for `dtype`: that of x."""
    x_RK = rows.x_RD if x_RK is None else x_RK
    chosen, blocks, plan, none = rows.chosen, rows.blocks, rows.plan, x_RK  # `none` stands for what the kernel does not read
    columns = weight_ENK.shape[1] if weight_ENK is not None else factors.factor_GQN.shape[2] if factors is not None else 0
    out_RN = x_RK.new_empty(x_RK.shape[0], columns, dtype=dtype)
    before_RN = x_RK.new_empty(out_RN.shape if epilogue.before else 0)
    u_NQ, factor_GQN = factors or (none, none[:, None])
    choices = chosen.pi_RL.shape[1] if chosen is not None and factors is not None else 0
    lores = "none" if factors is None else "own" if chosen is None else "chosen"
    pi, place, lore, order = (none,) * 4 if chosen is None else (chosen.pi_RL, chosen.place_RL, chosen.lore_N, chosen.order_N)
    weight, (stride_e, stride_n, stride_k) = (none, (0, 0, 0)) if weight_ENK is None else (weight_ENK, weight_ENK.stride())
    bias, other = none if epilogue.bias_EN is None else epilogue.bias_EN.contiguous(), none if epilogue.other_RN is None else epilogue.other_RN
    experts, rank = len(rows.rows_E), factor_GQN.shape[1]
    launch(
        kernels.project_kernel, (len(plan.group_P) if len(x_RK) else 0, cdiv(columns, blocks.columns)),
        x_RK, weight, bias, u_NQ, pi, place, lore, factor_GQN, other, before_RN if epilogue.before else none, out_RN, order,
        plan.group_P, plan.first_P, plan.bounds_G1, experts, lore.shape[0], factor_GQN.shape[0] // max(1, experts),
        x_RK.shape[0], x_RK.shape[1], columns, rank, stride_e, stride_k, stride_n, *factor_GQN.stride(),
        WEIGHT=weight_ENK is not None, LORES=lores, L=choices, BIAS=epilogue.bias_EN is not None, REORDER=choices == 1,
        ACTIVATION=epilogue.activation, BEFORE=epilogue.before, OTHER=_other(epilogue),
        BM=blocks.rows, BN=blocks.columns, BK=blocks.depth, BQ=_rank_block(rank, x_RK), PRECISION=precision(x_RK), ACC=accumulator(x_RK),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out_RN, before_RN


def _other(epilogue: Epilogue) -> str:
    if epilogue.other_RN is None:
        return "none"
    return "plus" if epilogue.plus else "times"


def _rank_block(rank: int, x: Tensor) -> int:
    """Ranks of up to 64 are one step. In float32 steps are 16 long: its products use no tensor cores, and longer steps spill."""
    return 16 if rank <= 16 or x.element_size() == 4 else 32 if rank <= 32 else 64


def _activation_backward(grad_RF: Tensor, up_RF: Tensor, gate_RF: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of up, of gate; without a gate the second is empty)."""
    grad_up = torch.empty_like(grad_RF)
    grad_gate = grad_RF.new_empty(0) if gate_RF is None else torch.empty_like(grad_RF)
    launch(
        kernels.activation_backward_kernel, (cdiv(grad_RF.numel(), 1024),),
        grad_RF, up_RF, up_RF if gate_RF is None else gate_RF, grad_up, grad_up if gate_RF is None else grad_gate, grad_RF.numel(),
        ACTIVATION=activation, GATED=gate_RF is not None, BLOCK=1024, ACC=accumulator(grad_RF), num_warps=4,
    )  # fmt: skip
    return grad_up, grad_gate


def _project_backward(
    rows: Rows, grad_RF: Tensor, projection: Projection, u_NQ: Tensor, before: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Projection, Tensor | None]:
    """Gradients of (x, in `dtype` and added to `before`; the projection's parts; pi)."""
    weight_EFD, a_GQD, b_GQF, bias_EF = projection
    grad_a = grad_b = grad_pi = factors = None
    if a_GQD is not None and b_GQF is not None:
        grads, counts = _in_lore_order(rows, grad_RF), _lore_counts(rows)
        grad_z = matmul(grads, b_GQF.mT, counts)
        z_NQ, grad_u, grad_pi = _scaled(rows, grad_z, u_NQ)
        grad_b = outer(Source(z_NQ), grads, counts)
        grad_a = outer(Source(grad_u), _in_lore_order(rows, rows.x_RD), counts)
        factors = Factors(grad_z, a_GQD)
    weight_EDF = None if weight_EFD is None else weight_EFD.mT
    grad_x, _ = _project(rows, weight_EDF, factors, Epilogue(other_RN=before, plus=True), grad_RF, dtype)
    grad_weight = None if weight_EFD is None else outer(Source(grad_RF), Source(rows.x_RD), rows.rows_E)
    grad_bias = None if bias_EF is None else sum_rows(grad_RF, rows.rows_E)
    return grad_x, Projection(grad_weight, grad_a, grad_b, grad_bias), grad_pi


def _scaled(rows: Rows, grad_z_NQ: Tensor, u_NQ: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(pi * u, pi * grad_z, gradient of pi); as given, and None, without a choice."""
    chosen: Any = rows.chosen
    if chosen is None:
        return u_NQ, grad_z_NQ, None
    z_NQ, grad_u, grad_pi = torch.empty_like(u_NQ), torch.empty_like(u_NQ), torch.zeros_like(chosen.pi_RL)
    count, rank = u_NQ.shape
    launch(
        kernels.scale_kernel, (cdiv(count, 32),), grad_z_NQ, u_NQ, chosen.pi_RL, chosen.order_N, grad_pi, z_NQ, grad_u, count, rank,
        BR=32, BQ=_rank_block(rank, u_NQ), ACC=accumulator(u_NQ), num_warps=4,
    )  # fmt: skip
    return z_NQ, grad_u, grad_pi
