"""Adam's update of many weights, and the norm of all gradients. The one place these are defined.

    g = gradient / divisor (+ decay * w, unless weight decay is decoupled);  m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr * decay, if it is decoupled) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
With 16-bit weights, w are their float32 copies, and the new w are rounded into them.

Nothing here is differentiated: an implementation changes tensors in place.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels import compiled
from megatron.kernels.adam.interface import Adam, AdamSettings, AdamTensors
from megatron.kernels.adam.reference import Reference
from megatron.kernels.registry import Implementation, Op

__all__ = ["OP", "AdamSettings", "AdamTensors", "adam_update", "gradient_norm"]


def _compiled() -> Adam:
    from megatron.kernels.adam.compiled import Compiled

    return Compiled()


OP: Op[Adam] = Op("adam")
OP.register(compiled.implementation(_compiled))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def gradient_norm(gradients: list[Tensor], *, backend: str = "auto") -> float:
    """The length of all gradients as one vector, summed in float64; 0 for none. Not finite where a number is not. Raises ValueError for integers."""
    if not gradients:
        return 0.0
    if not all(t.is_floating_point() for t in gradients):
        raise ValueError("gradient_norm: gradients must be floating-point numbers")
    return OP.resolve(backend, gradients[0].device.type).norm(gradients)


def adam_update(tensors: AdamTensors, settings: AdamSettings, *, backend: str = "auto") -> None:
    """The update above, in place. Raises ValueError for lists or shapes that do not fit, KernelUnavailable where `backend` cannot run."""
    lists = [each for each in tensors if each is not None]
    if len({len(each) for each in lists}) > 1:
        raise ValueError(f"adam_update: lists of {', '.join(str(len(each)) for each in lists)} entries; there must be one entry for each weight")
    for weight, *others in zip(tensors.weights, *(each for each in (*tensors[1:4], tensors.rounded) if each is not None), strict=True):
        for other in others:
            if other.shape != weight.shape or other.device != weight.device or not other.is_floating_point():
                raise ValueError(
                    f"adam_update: a tensor {tuple(other.shape)} of {other.dtype} on {other.device} for a weight {tuple(weight.shape)} on "
                    f"{weight.device}; gradients, averages and rounded weights have the shape and device of their weight"
                )
    if not settings.divisor > 0 or any(step < 1 for step in tensors.steps):
        raise ValueError(
            f"adam_update: divisor {settings.divisor} and steps from {min(tensors.steps, default=1)}; the first is above 0, steps from 1 on"
        )
    if tensors.weights:
        OP.resolve(backend, tensors.weights[0].device.type).update(tensors, settings)
