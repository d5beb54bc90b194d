"""The hidden layer of the experts by csrc/grouped_lore: LoREs, bias, activation and gate are applied before the sums leave the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.compiled import DTYPES, address, built, counts, serves
from megatron.kernels.grouped_lore.interface import Gradients, HiddenLayer, Projection, Saved, projection_width
from megatron.kernels.grouped_lore.reference import Reference

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""The number of each activation in csrc/include/activation.h."""


class Operands(NamedTuple):
    """A layer as csrc takes it; the tensors are kept here while their addresses are used."""

    sizes: list[int]
    parts: list[Tensor | None]
    choice: list[Tensor | None]
    activation: int
    dtype: int

    def arguments(self) -> tuple[list[int], list[int], list[int], int, int, int]:
        """What every call starts with."""
        addresses = [address(t) for t in self.parts], [address(t) for t in self.choice]
        return self.sizes, *addresses, self.activation, self.dtype, torch.get_num_threads()


class Compiled:
    """Forward and backward. A format that csrc lacks (float16) is the reference's."""

    def __init__(self) -> None:
        self.built = built()
        self.reference = Reference()

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs)."""
        if not serves(x_RD, *layer.up, *(layer.gate or ())):
            return self.reference.forward(x_RD, layer, save=save)
        x_RD = x_RD.contiguous()
        operands = operands_of(x_RD, layer)
        choices = operands.sizes[1] * operands.sizes[5]
        hidden_RF = x_RD.new_empty(x_RD.shape[0], projection_width(layer.up))
        gated = layer.gate is not None
        keeps = [save and (gated or layer.activation != "identity"), save and gated]
        before = [torch.empty_like(hidden_RF) if keep else x_RD.new_empty(0) for keep in keeps]
        shapes = [(choices, p.a_GQD.shape[1]) if save and p is not None and p.a_GQD is not None else (0,) for p in (layer.up, layer.gate)]
        inner = [x_RD.new_empty(shape) for shape in shapes]
        results = [hidden_RF, *(t if t.dim() == 2 else None for t in (*before, *inner))]
        self.built.lore_forward(*operands.arguments(), address(x_RD), [address(t) for t in results])
        return hidden_RF, Saved(*before, *inner)

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients of everything that is there."""
        if not serves(grad_RF, x_RD, *layer.up, *(layer.gate or ())):
            return self.reference.backward(grad_RF, x_RD, layer, saved)
        grad_RF, x_RD = grad_RF.contiguous(), x_RD.contiguous()
        saved = Saved(*(t.contiguous() for t in saved))
        operands = operands_of(x_RD, layer)
        grad_x = torch.empty_like(x_RD)
        grads = [None if t is None else torch.empty_like(t) for t in operands.parts]
        grad_pi = None if operands.choice[1] is None else torch.empty_like(operands.choice[1])
        given = [grad_RF, x_RD, *(t if t.dim() == 2 else None for t in saved)]
        addresses = [address(t) for t in given], [address(t) for t in (grad_x, *grads, grad_pi)]
        self.built.lore_backward(*operands.arguments(), *addresses)
        return Gradients(grad_x, Projection(*grads[:4]), None if layer.gate is None else Projection(*grads[4:]), grad_pi)


def operands_of(x_RD: Tensor, layer: HiddenLayer) -> Operands:
    """The layer with every tensor contiguous. Raises ValueError for counts or an order in another format."""
    parts = [None if t is None else t.contiguous() for t in (*layer.up, *(layer.gate or Projection()))]
    ranks = [0 if parts[place] is None else parts[place].shape[1] for place in (1, 5)]  # type: ignore[union-attr]
    lores = next((parts[place].shape[0] for place in (1, 5) if parts[place] is not None), 0)  # type: ignore[union-attr]
    rows_E, per_row = counts(layer.rows_E), 1
    choice: list[Tensor | None] = [rows_E, None, None, None, None]
    is_double = False
    if layer.choice is not None and lores:
        pi_RL, order = layer.choice.pi_RL, layer.choice.order
        if pi_RL.dtype not in (torch.float32, torch.float64):
            pi_RL = pi_RL.float()
        per_row, is_double = pi_RL.shape[1], pi_RL.dtype == torch.float64
        choice = [rows_E, pi_RL.contiguous(), *(counts(t) for t in order)]
        if order.order_R.numel() != pi_RL.numel():
            raise ValueError(f"grouped_lore: an order of {order.order_R.numel()} choices for weights {tuple(pi_RL.shape)}; give one place for each")
    sizes = [rows_E.shape[0], *x_RD.shape, projection_width(layer.up), lores, per_row, *ranks, int(is_double), int(choice[1] is not None)]
    return Operands(sizes, parts, choice, NUMBERS[layer.activation], DTYPES[x_RD.dtype])
