"""The types of `grouped_lore`: what is computed from, what is kept, and what an implementation supplies. Shapes as in the package's docstring."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from megatron.kernels.permute import Order


class LoreChoice(NamedTuple):
    """Which LoREs every row uses, and how strongly."""

    pi_RL: Tensor
    """Weights pi of each row's LoREs."""
    order: Order
    """The R*L choices sorted by LoRE: `sort_by_group(e*M + m)`. LoRE g belongs to expert g // M, so the order keeps experts together."""


class Projection(NamedTuple):
    """The parameters of one projection. At least a weight or two factors are there; `a_GQD` and `b_GQF` come together."""

    weight_EFD: Tensor | None = None
    """None: nothing but the factors."""
    a_GQD: Tensor | None = None
    """None: no LoREs."""
    b_GQF: Tensor | None = None
    """None: no LoREs."""
    bias_EF: Tensor | None = None
    """None: no bias."""


def projection_width(projection: Projection) -> int:
    """F."""
    if projection.weight_EFD is not None:
        return projection.weight_EFD.shape[1]
    assert projection.b_GQF is not None
    return projection.b_GQF.shape[2]


class HiddenLayer(NamedTuple):
    """What is computed from the rows."""

    rows_E: Tensor
    """int64: rows of each expert; they sum to R."""
    activation: str
    """A name of `kernels.activations.ACTIVATIONS`."""
    up: Projection
    gate: Projection | None = None
    """None: no gate, the activation is that of `up`."""
    choice: LoreChoice | None = None
    """None: each expert has one LoRE (G = E) for all its rows, with pi = 1; or none has any."""


class Saved(NamedTuple):
    """What the backward needs besides the inputs. Tensors that are not needed are empty ([0])."""

    up_RF: Tensor
    """The projection `up`. Empty where it is `hidden` itself (no gate, activation identity)."""
    gate_RF: Tensor
    u_up_NQ: Tensor
    """x A of `up`, before pi; in LoRE order."""
    u_gate_NQ: Tensor


class Gradients(NamedTuple):
    """Gradients of everything that is there; None for absent parts."""

    x_RD: Tensor
    up: Projection
    gate: Projection | None
    pi_RL: Tensor | None


class GroupedLore(Protocol):
    """What an implementation supplies."""

    def forward(self, x_RD: Tensor, layer: HiddenLayer, *, save: bool) -> tuple[Tensor, Saved]:
        """(hidden_RF, what the backward needs; all empty with save=False)."""
        ...

    def backward(self, grad_RF: Tensor, x_RD: Tensor, layer: HiddenLayer, saved: Saved) -> Gradients:
        """Gradients; `grad_RF` is that of the hidden layer. Sums are in float32 (float64 for float64) and rounded once."""
        ...
