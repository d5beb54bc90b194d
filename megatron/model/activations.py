"""Activation functions by their config names, for dense MLPs and experts alike."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS

Function = Callable[[Tensor], Tensor]

PLAIN: dict[str, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "softsign": "softsign",
    "swish": "silu",
    "mish": "mish",
    "silu": "silu",
}
"""The kernels' name of each activation."""
# A gated unit is act(gate) * up; the table names the activation of its gate (Shazeer, 2020, equations 5 and 6).
GATED: dict[str, str] = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu", "glu": "sigmoid", "bilinear": "identity"}


class UnknownActivation(ValueError):
    """An activation name that is in neither table."""


def activation_function(name: str) -> Function:
    """The elementwise function of the hidden layer, or of the gate in a gated unit. Raises UnknownActivation."""
    return ACTIVATIONS[kernel_activation(name)].value


def kernel_activation(name: str) -> str:
    """The same by its name in `kernels.activations.ACTIVATIONS`. Raises UnknownActivation."""
    names = PLAIN | GATED
    if name not in names:
        raise UnknownActivation(f"activation = '{name}': must be one of {', '.join(sorted(names))}")
    return names[name]
