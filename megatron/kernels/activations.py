"""Activations by name, each with its derivative: the epilogue of `grouped_lore`.

An implementation of the op computes them itself; `ACTIVATIONS` is the definition. Functions and derivatives are elementwise and take any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function and what a gradient becomes on its way back through it."""

    value: Callable[[Tensor], Tensor]
    """act(x)."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """(grad, x) -> grad * act'(x)."""


def _identity(x: Tensor) -> Tensor:
    return x


def _sigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(grad, x.sigmoid())


def _softsign_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad / (1 + x.abs()).square()


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, lambda grad, x: grad),
    "gelu": Activation(F.gelu, lambda grad, x: aten.gelu_backward(grad, x)),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "silu": Activation(F.silu, lambda grad, x: aten.silu_backward(grad, x)),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
    "mish": Activation(F.mish, lambda grad, x: aten.mish_backward(grad, x)),
    "softsign": Activation(F.softsign, _softsign_backward),
}
