"""Activation functions by their config names, for dense MLPs and experts alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """The gate of a bilinear unit: it changes nothing."""
    return x


Function = Callable[[Tensor], Tensor]

PLAIN: dict[str, Function] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "mish": F.mish,
    "silu": F.silu,
}
# A gated unit is act(gate) * up; the table names the activation of its gate (Shazeer, 2020, equations 5 and 6).
GATED: dict[str, Function] = {"geglu": F.gelu, "reglu": F.relu, "swiglu": F.silu, "glu": torch.sigmoid, "bilinear": identity}


class UnknownActivation(ValueError):
    """An activation name that is in neither table."""


def activation_function(name: str) -> Function:
    """The elementwise function of the hidden layer, or of the gate in a gated unit. Raises UnknownActivation."""
    functions = PLAIN | GATED
    if name not in functions:
        raise UnknownActivation(f"activation = '{name}': must be one of {', '.join(sorted(functions))}")
    return functions[name]
