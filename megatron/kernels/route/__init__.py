"""Routing: from a router's logits to choices, weights, counts and the sorted order, in one op for both routers. The one place this op is defined.

Shapes:  N rows;  C candidates;  K choices per row;  P parents;  G = P*C groups;  T tokens;  E experts.
    first router:   a row is a token, a candidate is an expert, and there is one parent: the layer.
    second router:  a row is a routed row, a candidate is one of the LoREs of the row's expert, and the parents are the experts. Rows are sorted by
                    expert, and `rows_P` says how many each expert has.
    probability_NC = softmax(logit_NC)
    choice_NK      = the K largest logits, largest first; of equal ones the lowest number first, and NaN counts as the largest
    weight_NK      = scale * probability at the choice, divided by the sum over the K choices with `normalize`
    order          = the N*K choices sorted by their key, parent*C + choice; equal keys stay in the order of rows
and what losses and statistics need: logsumexp_N, total_PC (the sum of the probabilities over a parent's rows) and the mean entropy.

Weights, probabilities, logsumexp and totals carry gradients to the logits; the rest does not. A row with NaN or +inf, or with only -inf, has no
probabilities. Its choices are still K different candidates, so that nothing is read out of range, and its numbers are NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels import compiled, cuda_library, triton_kernels
from megatron.kernels.operator import torch_operator
from megatron.kernels.permute import Order
from megatron.kernels.registry import Implementation, Op
from megatron.kernels.route.interface import Gradients, Route, Routed, Saved, Selection
from megatron.kernels.route.reference import Reference


def _compiled() -> Route:
    from megatron.kernels.route.compiled import Compiled

    return Compiled()


def _cuda() -> Route:
    from megatron.kernels.route.cuda import Cuda

    return Cuda()


def _triton() -> Route:
    from megatron.kernels.route.triton import Triton

    return Triton()


OP: Op[Route] = Op("route")
OP.register(compiled.implementation(_compiled))
OP.register(cuda_library.implementation(_cuda))
OP.register(Implementation("triton", triton_kernels.DEVICES, triton_kernels.unavailable, _triton))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))


def route(logit_NC: Tensor, selection: Selection, rows_P: Tensor | None = None, *, allow_nan: bool = False, backend: str = "auto") -> Routed:
    """The decision as above, in float32 (float64 for float64 logits). `rows_P` None: all rows have the same parent.

    Raises ValueError on shapes that do not fit, and for rows without probabilities unless `allow_nan`. That check waits for a GPU; with `allow_nan`
    nothing is transferred. The model allows NaN: its loss becomes NaN then, and the trainer skips the step and says so.
    """
    _check(logit_NC, selection, rows_P)
    wide_NC = logit_NC.to(torch.promote_types(logit_NC.dtype, torch.float32))
    *decision, order_R, inverse_NK, rows_G = _route(wide_NC, rows_P, *selection, allow_nan, backend)
    weight_NK, choice_NK, probability_NC, logsumexp_N, total_PC, entropy = decision
    return Routed(weight_NK, choice_NK, probability_NC, logsumexp_N, total_PC, entropy, Order(order_R, inverse_NK, rows_G))


def choice_statistics(choice_TK: Tensor, num_experts: int, length: int, *, backend: str = "auto") -> Tensor:
    """float64 [2]: the share of a token's experts that the token before did not use, and the mean number of experts per token.

    The share is equations 4 and 5 of CoSMoEs (Huber et al., 2025), over sequences of `length` tokens. Choice number `num_experts` is an empty place.
    """
    if choice_TK.ndim != 2 or choice_TK.dtype != torch.int64 or num_experts < 0:
        shape = tuple(choice_TK.shape)
        raise ValueError(f"choice_statistics: choices {shape} of {choice_TK.dtype} for {num_experts} experts; they must be int64, [tokens, choices]")
    if length < 1 or choice_TK.shape[0] % length:
        raise ValueError(f"choice_statistics: {choice_TK.shape[0]} tokens cannot be cut into sequences of {length}")
    statistics: Tensor = _statistics(choice_TK, num_experts, length, backend)
    return statistics


def _check(logit_NC: Tensor, selection: Selection, rows_P: Tensor | None) -> None:
    if logit_NC.ndim != 2 or not logit_NC.dtype.is_floating_point:
        raise ValueError(f"route: logits {tuple(logit_NC.shape)} of {logit_NC.dtype}; they must be floating-point numbers, [rows, candidates]")
    if not 1 <= selection.top_k <= logit_NC.shape[1]:
        raise ValueError(f"route: {selection.top_k} choices among {logit_NC.shape[1]} candidates; choose at least 1 and at most all of them")
    if rows_P is None:
        return
    if rows_P.ndim != 1 or rows_P.dtype != torch.int64:
        raise ValueError(f"route: row counts {tuple(rows_P.shape)} of {rows_P.dtype}; they must be int64, one for each parent")
    if rows_P.device != logit_NC.device:
        raise ValueError(f"route: logits on {logit_NC.device} and row counts on {rows_P.device}; both must be on the same device")


@torch_operator("neox::route")
def _route(
    logit_NC: Tensor, rows_P: Tensor | None, top_k: int, normalize: bool, scale: float, allow_nan: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    selection = Selection(top_k, normalize, scale)
    *decision, order = OP.resolve(backend, logit_NC.device.type).forward(logit_NC, rows_P, selection, allow_nan=allow_nan)
    return *decision, *order  # type: ignore[return-value]  # nine tensors


@torch_operator("neox::route_backward")
def _route_backward(
    grad_weight_NK: Tensor | None,
    grad_probability_NC: Tensor | None,
    grad_logsumexp_N: Tensor | None,
    grad_total_PC: Tensor | None,
    probability_NC: Tensor,
    choice_NK: Tensor,
    rows_P: Tensor | None,
    normalize: bool,
    scale: float,
    backend: str,
) -> Tensor:
    grads = Gradients(grad_weight_NK, grad_probability_NC, grad_logsumexp_N, grad_total_PC)
    selection = Selection(choice_NK.shape[1], normalize, scale)
    return OP.resolve(backend, probability_NC.device.type).backward(grads, Saved(probability_NC, choice_NK, rows_P), selection)


@torch_operator("neox::choice_statistics")
def _statistics(choice_TK: Tensor, num_experts: int, length: int, backend: str) -> Tensor:
    return OP.resolve(backend, choice_TK.device.type).statistics(choice_TK, num_experts, length)


@torch.library.register_fake("neox::route")
def _(
    logit_NC: Tensor, rows_P: Tensor | None, top_k: int, normalize: bool, scale: float, allow_nan: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, candidates = logit_NC.shape
    parents = 1 if rows_P is None else rows_P.shape[0]
    weight_NK, probability_NC, logsumexp_N, total_PC, entropy = (
        logit_NC.new_empty(shape) for shape in ((rows, top_k), (rows, candidates), (rows,), (parents, candidates), ())
    )
    choice_NK, order_R, inverse_NK, rows_G = (
        logit_NC.new_empty(shape, dtype=torch.int64) for shape in ((rows, top_k), (rows * top_k,), (rows, top_k), (parents * candidates,))
    )
    return weight_NK, choice_NK, probability_NC, logsumexp_N, total_PC, entropy, order_R, inverse_NK, rows_G


@torch.library.register_fake("neox::route_backward")
def _(*given: Any) -> Tensor:
    probability_NC: Tensor = given[4]
    return probability_NC.new_empty(probability_NC.shape)


@torch.library.register_fake("neox::choice_statistics")
def _(choice_TK: Tensor, num_experts: int, length: int, backend: str) -> Tensor:
    return choice_TK.new_empty(2, dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rows_P, _, ctx.normalize, ctx.scale, _, ctx.backend = inputs
    _, choice_NK, probability_NC, _, _, entropy, *order = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(choice_NK, entropy, *order)
    ctx.has_rows = rows_P is not None
    ctx.save_for_backward(probability_NC, choice_NK, *(() if rows_P is None else (rows_P,)))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, _, probability, logsumexp, total, *_ = grads
    grad_logit = None
    if any(grad is not None for grad in (weight, probability, logsumexp, total)):
        saved = ctx.saved_tensors if ctx.has_rows else (*ctx.saved_tensors, None)
        grad_logit = _route_backward(weight, probability, logsumexp, total, *saved, ctx.normalize, ctx.scale, ctx.backend)
    return grad_logit, None, None, None, None, None, None


_route.differentiate(_save, _backward)
