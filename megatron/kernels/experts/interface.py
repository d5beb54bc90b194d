"""The types of `experts`: what is computed from, and what an implementation supplies. Shapes as in the package's docstring."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class ExpertWeights(NamedTuple):
    """The matrices of all experts of a layer."""

    up_EFD: Tensor
    gate_EFD: Tensor | None
    """None: no gate."""
    down_EFD: Tensor


class Choices(NamedTuple):
    """What the router decided."""

    expert_TK: Tensor
    """int64, 0 to E - 1."""
    weight_TK: Tensor


class Experts(Protocol):
    """What an implementation supplies; it brings its own gradients."""

    def compute(self, x_TD: Tensor, choices: Choices, weights: ExpertWeights, activation: str) -> Tensor:
        """y_TD."""
        ...

    def compute_rows(self, x_RD: Tensor, rows_E: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
        """y_RD, of rows that are sorted by expert."""
        ...
