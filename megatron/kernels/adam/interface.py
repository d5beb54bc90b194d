"""What Adam's update is given, and what an implementation supplies."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class AdamTensors(NamedTuple):
    """The tensors of a group of weights, all lists in the same order."""

    weights: list[Tensor]
    """float32."""
    gradients: list[Tensor]
    """Of any floating-point format."""
    averages: list[Tensor]
    """Moving averages of the gradients (PyTorch's `exp_avg`)."""
    squares: list[Tensor]
    """Moving averages of their squares (`exp_avg_sq`)."""
    steps: list[float]
    """How many updates each weight has had, this one included."""
    rounded: list[Tensor] | None
    """16-bit weights that take the new weights, rounded. None: there are none."""


class AdamSettings(NamedTuple):
    """PyTorch's names and meanings, and what the gradients are divided by first."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    divisor: float


class Adam(Protocol):
    """What an implementation supplies."""

    def norm(self, gradients: list[Tensor]) -> float:
        """The length of all gradients together, summed in float64."""
        ...

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Changes weights, averages, squares and the rounded weights in place; gradients stay as they are."""
        ...
