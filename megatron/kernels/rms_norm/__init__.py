"""RMSNorm (Zhang and Sennrich, 2019). The one place this op is defined.

    y = scale * (x / sqrt(mean(x^2) + epsilon)), the mean over the last dimension, the division in float32 whatever the dtype, as NeoX has it
`scale` has the shape of the last dimensions of x: of the last alone, or also of those before it (heads with scales of their own).

An implementation supplies the forward and the backward. Saved for the backward are x and inverse = 1 / sqrt(mean(x^2) + epsilon).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.kernels import compiled
from megatron.kernels.operator import torch_operator
from megatron.kernels.registry import Implementation, Op
from megatron.kernels.rms_norm import apex
from megatron.kernels.rms_norm.reference import Reference


class RmsNorm(Protocol):
    """What an implementation supplies."""

    def forward(self, x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(y, inverse of the shape of x without its last dimension, at least float32)."""
        ...

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the scale."""
        ...


def _compiled() -> RmsNorm:
    from megatron.kernels.rms_norm.compiled import Compiled

    return Compiled()


OP: Op[RmsNorm] = Op("rms_norm")
OP.register(compiled.implementation(_compiled))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))
OP.register(Implementation("apex", frozenset({"cuda"}), apex.unavailable, apex.Apex))  # by name only: NeoX's key `rmsnorm_fusion` asks for it


def rms_norm(x: Tensor, scale: Tensor, epsilon: float, *, backend: str = "auto") -> Tensor:
    """y of the shape of x. Raises ValueError where the scale does not fit, KernelUnavailable where `backend` cannot run."""
    if not scale.ndim or x.shape[-scale.ndim :] != scale.shape or not scale.shape[-1]:
        raise ValueError(f"rms_norm: a scale of the shape {tuple(scale.shape)} for x {tuple(x.shape)}; it must have the shape of x's last dimensions")
    if not (x.is_floating_point() and scale.is_floating_point()) or x.device != scale.device:
        raise ValueError(
            f"rms_norm: x is {x.dtype} on {x.device} and the scale {scale.dtype} on {scale.device}; give floating-point numbers on one device"
        )
    y: Tensor = _rms_norm(x, scale, epsilon, backend)[0]
    return y


@torch_operator("neox::rms_norm")
def _rms_norm(x: Tensor, scale: Tensor, epsilon: float, backend: str) -> tuple[Tensor, Tensor]:
    return OP.resolve(backend, x.device.type).forward(x, scale, epsilon)


@torch_operator("neox::rms_norm_backward")
def _rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return OP.resolve(backend, x.device.type).backward(grad, x, scale, inverse)


@torch.library.register_fake("neox::rms_norm")
def _(x: Tensor, scale: Tensor, epsilon: float, backend: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))
    return y, x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("neox::rms_norm_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    grad_x, grad_scale = _rms_norm_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_scale, None, None


_rms_norm.differentiate(_save, _backward)
