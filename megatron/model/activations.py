"""Activation functions by their config names, for dense MLPs and experts alike. GELU is the exact (erf) one."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}
# A gated unit is act(gate) * up; the table names the activation of its gate.
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


class UnknownActivation(ValueError):
    """An activation name that is in neither table."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function: of the hidden layer, or for a gated unit of its gate. Raises UnknownActivation."""
    functions = PLAIN | GATED
    if name not in functions:
        raise UnknownActivation(f"activation = '{name}': must be one of {', '.join(sorted(functions))}")
    return functions[name]
