"""Causal self-attention, with rotary positions or without. The one place this op is defined.

Shapes: B batch; S sequence; H query heads; K key/value heads, which H/K query heads share; d head dimension; n dimensions that are turned;
W = (H + 2K)*d, the width of a fused projection.
    context_BHSd = softmax over the keys up to each query's own of (q k^T / sqrt(d)) v
where q and k are the given queries and keys, turned by their positions' angles if there is a rotation. Masks, windows, dropout and caches are not
this op's: `megatron/model/attention` computes them by PyTorch's SDPA.

An implementation supplies the forward and the backward. Saved for the backward are the inputs, the context and log_sum_BHS = log(sum of e^score). A
fused projection stays one tensor: its gradient is written in place of its parts, so nothing is cut, turned or put together in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels import compiled
from megatron.kernels.attention.interface import Attention, Given, HeadLayout, Rotation
from megatron.kernels.attention.reference import Reference
from megatron.kernels.attention.sdpa import Sdpa
from megatron.kernels.operator import torch_operator
from megatron.kernels.registry import Implementation, Op

__all__ = ["OP", "HeadLayout", "Rotation", "attention", "fused_attention"]


def _compiled() -> Attention:
    from megatron.kernels.attention.compiled import Compiled

    return Compiled()


OP: Op[Attention] = Op("attention")
OP.register(compiled.implementation(_compiled))
OP.register(Implementation("torch", frozenset({"cpu", "cuda"}), lambda: None, Sdpa))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def attention(query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None = None, *, backend: str = "auto") -> Tensor:
    """context_BHSd, which lies in memory as BSHd.

    Raises ValueError on shapes or formats that do not fit, KernelUnavailable where `backend` cannot run.
    """
    parts = [query_BHSd, key_BKSd, value_BKSd]
    if any(t.ndim != 4 for t in parts) or key_BKSd.shape != value_BKSd.shape or _without_heads(query_BHSd) != _without_heads(key_BKSd):
        shapes = ", ".join(str(tuple(t.shape)) for t in parts)
        raise ValueError(
            f"attention: queries, keys and values of the shapes {shapes}; they must be [batch, heads, length, dim] and differ in heads only"
        )
    layout = HeadLayout(query_BHSd.shape[1], key_BKSd.shape[1], query_BHSd.shape[3])
    _check(parts, layout)
    _check_rotation(rotation, query_BHSd.shape[0], query_BHSd.shape[2], query_BHSd.shape[3])
    context_BHSd: Tensor = _attention(parts, list(layout), list(rotation or ()), backend)[0]
    return context_BHSd


def fused_attention(fused_BSW: Tensor, layout: HeadLayout, rotation: Rotation | None = None, *, backend: str = "auto") -> Tensor:
    """The same for a fused projection; raises the same."""
    if fused_BSW.ndim != 3 or fused_BSW.shape[2] != (layout.heads + 2 * layout.kv_heads) * layout.head_dim:
        raise ValueError(f"attention: a fused projection of the shape {tuple(fused_BSW.shape)} for {layout}; it must be [batch, length, (H + 2K)*d]")
    _check([fused_BSW], layout)
    _check_rotation(rotation, fused_BSW.shape[0], fused_BSW.shape[1], layout.head_dim)
    context_BHSd: Tensor = _attention([fused_BSW.contiguous()], list(layout), list(rotation or ()), backend)[0]
    return context_BHSd


def _without_heads(x_BHSd: Tensor) -> tuple[int, ...]:
    return (x_BHSd.shape[0], *x_BHSd.shape[2:])


def _check(parts: list[Tensor], layout: HeadLayout) -> None:
    heads, kv_heads, dim = layout
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads cannot be shared out among {kv_heads} key/value heads; the first must be a multiple")
    if dim < 1:
        raise ValueError(f"attention: heads of {dim} dimensions; they must have one or more")
    formats = {(t.dtype, t.device) for t in parts}
    if len(formats) > 1 or not parts[0].is_floating_point():
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in formats))
        raise ValueError(f"attention: queries, keys and values are {names}; they must have one floating-point format and one device")


def _check_rotation(rotation: Rotation | None, batch: int, length: int, dim: int) -> None:
    if rotation is None:
        return
    cos, sin = rotation
    half = cos.shape[-1] if cos.ndim else 0
    if cos.shape != sin.shape or cos.shape not in ((length, half), (batch, length, half)) or 2 * half > dim:
        raise ValueError(
            f"attention: cosines {tuple(cos.shape)} and sines {tuple(sin.shape)} for {batch} texts of {length} tokens and {dim} dimensions; "
            "both must be [length, n/2] or [batch, length, n/2], with n at most the dimensions"
        )


def _heads(parts: list[Tensor], layout: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries BHSd, keys BKSd, values BKSd as views of what the op is given."""
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    query, key, value = (t.transpose(1, 2) for t in HeadLayout(*layout).views(parts[0]))
    return query, key, value


def _gradient_of(part: Tensor) -> Tensor:
    """Its gradient, not filled: as BSHd in memory for heads, which is how projections give them."""
    return part.new_empty(part.shape) if part.ndim == 3 else part.new_empty(part.transpose(1, 2).shape).transpose(1, 2)


@torch_operator("neox::attention")
def _attention(parts: list[Tensor], layout: list[int], rotation: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """`parts`: queries, keys and values, or the fused projection alone. `rotation`: nothing, or cosines and sines."""
    return OP.resolve(backend, parts[0].device.type).forward(*_heads(parts, layout), Rotation(*rotation) if rotation else None)


@torch_operator("neox::attention_backward")
def _attention_backward(given: list[Tensor], parts: list[Tensor], layout: list[int], rotation: list[Tensor], backend: str) -> list[Tensor]:
    """`given`: the gradient of the context, the context and the logarithms of the sums. Returns the gradients of the parts."""
    grad_BHSd, context_BHSd, log_sum_BHS = given
    gradients = [_gradient_of(t) for t in parts]
    all_given = Given(grad_BHSd, *_heads(parts, layout), context_BHSd, log_sum_BHS, Rotation(*rotation) if rotation else None)
    OP.resolve(backend, parts[0].device.type).backward(all_given, _heads(gradients, layout))
    return gradients


@torch.library.register_fake("neox::attention")
def _(parts: list[Tensor], layout: list[int], rotation: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = _heads(parts, layout)[0].shape
    log_sum_BHS = parts[0].new_empty(batch, heads, length, dtype=torch.promote_types(parts[0].dtype, torch.float32))
    return parts[0].new_empty(batch, length, heads, dim).transpose(1, 2), log_sum_BHS


@torch.library.register_fake("neox::attention_backward")
def _(given: list[Tensor], parts: list[Tensor], layout: list[int], rotation: list[Tensor], backend: str) -> list[Tensor]:
    return [_gradient_of(t) for t in parts]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    parts, ctx.layout, rotation, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.num_parts = len(parts)
    ctx.save_for_backward(*output, *parts, *rotation)


def _backward(ctx: Any, grad_BHSd: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    context_BHSd, log_sum_BHS, *rest = ctx.saved_tensors
    parts, rotation = rest[: ctx.num_parts], rest[ctx.num_parts :]
    if grad_BHSd is None:
        return [None] * len(parts), None, [None] * len(rotation), None
    gradients = _attention_backward([grad_BHSd, context_BHSd, log_sum_BHS], parts, ctx.layout, rotation, ctx.backend)
    return gradients, None, [None] * len(rotation), None


_attention.differentiate(_save, _backward)
