"""The expert layer behind the router in one op: bring every token to its experts, compute them, add up the results. The one place it is defined.

Shapes: T tokens; R rows, sorted by expert; K experts per token; E experts; D model width; F expert width.
    y_TD[t] = sum over k of weight_TK[t, k] * expert e(t, k) of x_TD[t]
    expert e of x = act(x @ up_EFD[e]^T) @ down_EFD[e],  with a gate  (act(x @ gate_EFD[e]^T) * (x @ up_EFD[e]^T)) @ down_EFD[e]

The reference is the usual way: dispatch, hidden layer, second product and sum are ops of their own, each with its own entry in `kernel_backends`, and
a model calls those. Another implementation computes the whole. It runs where the configuration names it, and the entries of the single ops have
no effect then. Where the experts are divided among processes, rows arrive that are sorted by expert already: `experts_of_rows` computes those.
Implementations bring their gradients along: libraries have them too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.experts import megablocks
from megatron.kernels.experts.interface import Choices, Experts, ExpertWeights
from megatron.kernels.experts.reference import Reference
from megatron.kernels.registry import Implementation, Op

OP: Op[Experts] = Op("experts")
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, Reference))
OP.register(Implementation("megablocks", frozenset({"cuda"}), megablocks.unavailable, megablocks.MegaBlocks))  # by name only


def experts(x_TD: Tensor, choices: Choices, weights: ExpertWeights, *, activation: str, backend: str) -> Tensor:
    """y_TD. Raises ValueError on shapes or names that do not fit, KernelUnavailable where `backend` cannot run."""
    _check(x_TD, weights, activation)
    if choices.expert_TK.shape != choices.weight_TK.shape or choices.expert_TK.ndim != 2 or len(choices.expert_TK) != len(x_TD):
        pair = f"{tuple(choices.expert_TK.shape)} and {tuple(choices.weight_TK.shape)}"
        raise ValueError(f"experts: choices and weights of shapes {pair} for {len(x_TD)} tokens; both are [tokens, experts per token]")
    return OP.resolve(backend, x_TD.device.type).compute(x_TD, choices, weights, activation)


def experts_of_rows(x_RD: Tensor, rows_E: Tensor, weights: ExpertWeights, *, activation: str, backend: str) -> Tensor:
    """y_RD: every row by its own expert, without the router's weights. Raises as `experts` does. All matrices get a gradient, of no rows too."""
    _check(x_RD, weights, activation)
    if rows_E.shape != weights.up_EFD.shape[:1] or rows_E.dtype != torch.int64:
        raise ValueError(f"experts: counts {tuple(rows_E.shape)} of {rows_E.dtype} for {len(weights.up_EFD)} experts; give an int64 count for each")
    return OP.resolve(backend, x_RD.device.type).compute_rows(x_RD, rows_E, weights, activation)


def _check(x_TD: Tensor, weights: ExpertWeights, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: there is no activation '{activation}'; known: {', '.join(ACTIVATIONS)}")
    given, shape = [t for t in weights if t is not None], weights.up_EFD.shape
    if len(shape) != 3 or any(t.shape != shape for t in given) or x_TD.ndim != 2 or x_TD.shape[1] != shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise ValueError(f"experts: x {tuple(x_TD.shape)} must be [tokens, width] and all matrices ({shapes}) [experts, expert width, width]")
