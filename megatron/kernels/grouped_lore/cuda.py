"""The hidden layer of the experts by the CUDA kernels of csrc: bfloat16 and float16, sums in float32; other dtypes by the reference.

Shapes as in the package's docstring. A projection is one product: its steps run over the weight and then over the LoREs that a tile of rows has, and
bias, activation and gate follow before anything is written. With one LoRE per row, tiles take the rows in LoRE order, so that a tile has few LoREs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.cuda_library import HALVES, MOST_GROUPS, CudaLibrary, Gathered, Groups, Lores, Rows, check_counts, load
from megatron.kernels.grouped_lore.interface import Gradients, HiddenLayer, LoreChoice, Projection, Saved, projection_width
from megatron.kernels.grouped_lore.reference import Reference

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""Activations as csrc/include/cuda_epilogue.cuh numbers them."""
MOST_SHARED, TILE_SHARED = 96 * 1024, 70 * 1024
"""Bytes of shared memory that every architecture has for a block, and what a product needs without LoREs."""


class Places(NamedTuple):
    """How rows, LoRE rows and their groups relate: computed once for a forward or a backward."""

    experts: Groups
    lores: Groups
    """The experts again where nothing is chosen."""
    gathered: Gathered | None
    """The row of each LoRE row; None: the same."""
    inverse_RL: Tensor | None
    """None: a tile takes its rows in LoRE order, or there is no choice."""
    per_row: int
    pi: Tensor | None
    """float32, one for each choice."""

    @property
    def tile_rows(self) -> Gathered | None:
        """The order in which a product over experts takes its rows."""
        return self.gathered if self.inverse_RL is None else None


class Cuda:
    """Forward and backward. Nothing waits for the device: counts on a GPU are not checked but cut off at the rows that there are."""

    def __init__(self, library: CudaLibrary | None = None) -> None:
        """`library` None: the one for the GPU."""
        self.library = library or load()
        self.reference = Reference()

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs)."""
        if not _fits(x_RD, layer):
            return self.reference.forward(x_RD, layer, save=save)
        x_RD, layer = x_RD.contiguous(), _contiguous(layer, x_RD)
        places = self._places(x_RD.shape[0], layer)
        nothing, shape = x_RD.new_empty(0), (x_RD.shape[0], projection_width(layer.up))
        hidden_RF, gate_RF, u_gate = self.library.empty(x_RD, *shape), None, nothing
        if layer.gate is not None:
            gate_RF = self.library.empty(x_RD, *shape)
            u_gate = self._project(x_RD, layer.gate, places, Outputs(product=gate_RF), save=save)
        keep_up = save and (layer.gate is not None or layer.activation != "identity")
        up_RF = self.library.empty(x_RD, *shape) if keep_up else None
        outputs = Outputs(up_RF, hidden_RF, gate_RF, NUMBERS[layer.activation])
        u_up = self._project(x_RD, layer.up, places, outputs, save=save)
        if not save:
            return hidden_RF, Saved(*(x_RD.new_empty(0) for _ in range(4)))
        return hidden_RF, Saved(nothing if up_RF is None else up_RF, x_RD.new_empty(0) if gate_RF is None else gate_RF, u_up, u_gate)

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients of everything that is there."""
        if not _fits(x_RD, layer) or grad_RF.dtype != x_RD.dtype:
            return self.reference.backward(grad_RF, x_RD, layer, saved)
        grad_RF, x_RD, layer = grad_RF.contiguous(), x_RD.contiguous(), _contiguous(layer, x_RD)
        places, number = self._places(x_RD.shape[0], layer), NUMBERS[layer.activation]
        grad_x = self.library.empty(x_RD, *x_RD.shape)
        if layer.gate is None:
            grad_up = grad_RF if layer.activation == "identity" else self.library.activation_backward(grad_RF, saved.up_RF, None, number)[0]
            up, grad_pi = self._project_backward(grad_up, x_RD, layer.up, places, saved.u_up_NQ, GradX(product=grad_x))
            return Gradients(grad_x, up, None, _grad_pi(layer.choice, grad_pi))
        grad_up, grad_gate = self.library.activation_backward(grad_RF, saved.up_RF, saved.gate_RF, number)
        assert grad_gate is not None
        sums = self.library.empty(x_RD, *x_RD.shape, dtype=torch.float32)
        up, grad_pi = self._project_backward(grad_up, x_RD, layer.up, places, saved.u_up_NQ, GradX(sums=sums))
        gate, grad_pi_gate = self._project_backward(grad_gate, x_RD, layer.gate, places, saved.u_gate_NQ, GradX(addend=sums, product=grad_x))
        return Gradients(grad_x, up, gate, _grad_pi(layer.choice, grad_pi, grad_pi_gate))

    def _places(self, rows: int, layer: HiddenLayer) -> Places:
        experts, choice = self.library.offsets(layer.rows_E, rows), layer.choice
        if choice is None:
            return Places(experts, experts, None, None, 1, None)
        order, per_row = choice.order, choice.pi_RL.shape[1]
        check_counts(order.rows_G, choice.pi_RL.numel())
        lores = self.library.offsets(order.rows_G, choice.pi_RL.numel())
        inverse = None if per_row == 1 else order.inverse_TK
        return Places(experts, lores, Gathered(order.order_R, per_row), inverse, per_row, choice.pi_RL.float())

    def _project(self, x_RD: Tensor, projection: Projection, places: Places, outputs: Outputs, *, save: bool) -> Tensor:
        """Writes the outputs; returns u_NQ, empty where there are no LoREs or nothing is saved."""
        u_NQ, lores, library = x_RD.new_empty(0), None, self.library
        if projection.a_GQD is not None and projection.b_GQF is not None:
            rank = projection.a_GQD.shape[1]
            z_NQ = library.empty(x_RD, places.lores.places, rank)
            u = library.empty(x_RD, *z_NQ.shape) if save and places.pi is not None else None
            product: dict[str, Any] = {"product": z_NQ} if places.pi is None else {"product": u, "result": z_NQ, "scale": places.pi}
            inner = Rows(x_RI=x_RD, groups=places.lores, weight=projection.a_GQD, outer=False, width=rank, gathered=places.gathered, **product)
            library.rows(inner)
            lores = _lores(z_NQ, projection.b_GQF, places)
            u_NQ = u if u is not None else z_NQ if save else u_NQ
        width = projection_width(projection)
        results: dict[str, Any] = {"product": outputs.product, "result": outputs.result, "gate": outputs.gate, "activation": outputs.activation}
        layout: dict[str, Any] = {"gathered": places.tile_rows, "scatter": True} if lores is not None else {}
        weight, bias = projection.weight_EFD, projection.bias_EF
        library.rows(Rows(x_RI=x_RD, groups=places.experts, weight=weight, outer=False, width=width, lores=lores, bias=bias, **results, **layout))
        return u_NQ

    def _project_backward(
        self, grad_RF: Tensor, x_RD: Tensor, projection: Projection, places: Places, u_NQ: Tensor, grad_x: GradX
    ) -> tuple[Projection, Tensor | None]:
        """Gradients of (the projection's parts, pi in float32); writes that of x."""
        library, lores, grad_pi, grad_a, grad_b = self.library, None, None, None, None
        weight_EFD, a_GQD, b_GQF, bias_EF = projection
        if a_GQD is not None and b_GQF is not None:
            z_NQ, grad_u_NQ = u_NQ, library.empty(u_NQ, *u_NQ.shape)
            lore_rows = Rows(
                x_RI=grad_RF, groups=places.lores, weight=b_GQF, outer=False, width=b_GQF.shape[1], gathered=places.gathered, product=grad_u_NQ
            )
            library.rows(lore_rows)
            if places.pi is not None and places.gathered is not None:
                z_NQ, grad_u_NQ, grad_pi = library.lore_gradients(u_NQ, grad_u_NQ, places.pi, places.gathered.order_N)
            grad_a = library.outer(grad_u_NQ, x_RD, places.lores, places.gathered)
            grad_b = library.outer(z_NQ, grad_RF, places.lores, places.gathered)
            lores = _lores(grad_u_NQ, a_GQD, places)
        layout: dict[str, Any] = {"gathered": places.tile_rows, "scatter": True} if lores is not None else {}
        results: dict[str, Any] = {"product": grad_x.product, "sums": grad_x.sums, "addend": grad_x.addend}
        width = x_RD.shape[1]
        library.rows(Rows(x_RI=grad_RF, groups=places.experts, weight=weight_EFD, outer=True, width=width, lores=lores, **results, **layout))
        grad_weight = None if weight_EFD is None else library.outer(grad_RF, x_RD, places.experts)
        grad_bias = None if bias_EF is None else library.column_sums(grad_RF, places.experts)
        return Projection(grad_weight, grad_a, grad_b, grad_bias), grad_pi


class Outputs(NamedTuple):
    """What a projection writes."""

    product: Tensor | None = None
    """The projection itself; None: nobody needs it."""
    result: Tensor | None = None
    """act(projection), or act(gate) * projection; None: nobody needs it."""
    gate: Tensor | None = None
    """None: no gate."""
    activation: int = 0


class GradX(NamedTuple):
    """Where a projection's part of the gradient of x goes."""

    product: Tensor | None = None
    """Rounded; None: `sums` has it."""
    sums: Tensor | None = None
    """float32; None: `product` has it."""
    addend: Tensor | None = None
    """float32, what another projection put into its `sums`; None: nothing."""


def _lores(z_NQ: Tensor, factor_GQO: Tensor, places: Places) -> Lores:
    return Lores(z_NQ=z_NQ, factor_GQO=factor_GQO, groups=places.lores, inverse_RL=places.inverse_RL, per_row=places.per_row)


def _fits(x_RD: Tensor, layer: HiddenLayer) -> bool:
    """Whether the kernels compute this: one 16-bit dtype, and LoREs whose numbers fit into shared memory."""
    parts = [t for t in (*layer.up, *(layer.gate or ())) if t is not None]
    experts, lores = layer.rows_E.shape[0], 1 if layer.choice is None else layer.choice.order.rows_G.shape[0]
    per_row = 1 if layer.choice is None else layer.choice.pi_RL.shape[1]
    shared = TILE_SHARED + per_row * (1024 + lores // max(1, experts) // 8 + 4)
    return x_RD.dtype in HALVES and all(t.dtype == x_RD.dtype for t in parts) and shared <= MOST_SHARED and max(experts, lores) <= MOST_GROUPS


def _contiguous(layer: HiddenLayer, x_RD: Tensor) -> HiddenLayer:
    """The layer with tensors that a kernel can read; its counts where x is."""
    check_counts(layer.rows_E, x_RD.shape[0])

    def whole(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        return tensor if tensor.ndim != 2 or tensor.data_ptr() % 16 == 0 else tensor.clone()  # a bias is read 16 bytes at a time

    up, gate = Projection(*map(whole, layer.up)), None if layer.gate is None else Projection(*map(whole, layer.gate))
    choice = layer.choice
    if choice is not None:
        order = choice.order._replace(**{name: t.to(torch.int64).contiguous() for name, t in choice.order._asdict().items()})
        choice = LoreChoice(choice.pi_RL.contiguous(), order)
    return HiddenLayer(layer.rows_E.to(x_RD.device, torch.int64).contiguous(), layer.activation, up, gate, choice)


def _grad_pi(choice: LoreChoice | None, *grads: Tensor | None) -> Tensor | None:
    """The sum of what the projections give, in the dtype of pi. None: there is no choice."""
    there = [grad for grad in grads if grad is not None]
    if choice is None or not there:
        return None
    total = there[0] if len(there) == 1 else there[0] + there[1]
    return total.to(choice.pi_RL.dtype)
