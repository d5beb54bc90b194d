"""The expert layer by MegaBlocks (Gale et al., 2022): the package's dropless experts, `ParallelDroplessMLP`, on grouped products.

The package keeps matrices as we do, [E*F, D] for both products. Its names differ: in its gated experts `w1` is the projection with the activation,
our gate, and `v1` is our up-projection.

What it cannot do: LoREs, products of thin matrices, biases of experts, tokens with fewer than K experts, and other formats than bfloat16 (the package
grouped_gemm multiplies in no other). The configuration refuses those. It waits for the device once a layer, to read the row counts.

Where the experts are divided among processes, rows travel by the op `dispatch`, and the package computes each process's own experts. Its own exchange
(`moe_expert_model_parallelism`) drops nothing either, but it is not used: it divides the experts' gradients by the number of processes, which our
means of gradients do as well; the shared expert could not be computed while it waits; and its counts of rows stay inside.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.experts.interface import Choices, ExpertWeights

OLDEST = (0, 10)
"""The first version whose grouped products were tried here."""
PARTS = ("megablocks_ops", "grouped_gemm", "stk", "triton")
"""The modules that its grouped experts import: its own compiled operations, and three packages."""


def unavailable() -> str | None:
    """Why the package cannot run. None: it can."""
    try:
        found = version("megablocks")
    except PackageNotFoundError:
        return "the package megablocks is not installed"
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"megablocks {found} is installed, and {'.'.join(map(str, OLDEST))} or newer is needed"
    missing = [name for name in PARTS if find_spec(name) is None]
    if missing:
        return f"megablocks is installed without {' and '.join(missing)}; install it with its extra 'gg' where CUDA's compiler is"
    return None


class MegaBlocks:
    """The package's layers, called with our weights."""

    def compute(self, x_TD: Tensor, choices: Choices, weights: ExpertWeights, activation: str) -> Tensor:
        """y_TD. The gradients are the package's own; that of `weight_TK` is rounded to the format of x."""
        if len(x_TD) == 0:  # its kernels do not start without tokens
            return _of_nothing(x_TD, weights)
        layer = _layer(_arguments(weights, activation, choices.expert_TK.shape[1]))
        parameters = {f"mlp.{name}": t for name, t in _parameters(weights).items()}
        y_1TD: Tensor = functional_call(layer, parameters, (x_TD[None].contiguous(), None, choices.weight_TK, choices.expert_TK))
        return y_1TD[0]

    def compute_rows(self, x_RD: Tensor, rows_E: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
        """y_RD, by the part of that layer that comes after its own sort (`GroupedMLP`, `GroupedGLU`)."""
        if len(x_RD) == 0:
            return _of_nothing(x_RD, weights)
        mlp = _grouped(_arguments(weights, activation, 1))
        y_RD: Tensor = functional_call(mlp, _parameters(weights), (x_RD.contiguous(), rows_E))
        return y_RD


class Arguments(NamedTuple):
    """What a layer of the package is made from here."""

    hidden: int
    width: int
    experts: int
    top_k: int
    activation: str
    gated: bool


def _arguments(weights: ExpertWeights, activation: str, top_k: int) -> Arguments:
    experts, width, hidden = weights.up_EFD.shape
    return Arguments(hidden, width, experts, top_k, activation, weights.gate_EFD is not None)


def _parameters(weights: ExpertWeights) -> dict[str, Tensor]:
    """Our matrices under the package's names, as it keeps them."""
    first = weights.up_EFD if weights.gate_EFD is None else weights.gate_EFD
    named = {"w1": first, "w2": weights.down_EFD} | ({} if weights.gate_EFD is None else {"v1": weights.up_EFD})
    return {name: t.reshape(-1, t.shape[2]) for name, t in named.items()}


def _of_nothing(x_RD: Tensor, weights: ExpertWeights) -> Tensor:
    """No rows, with a gradient of zeros for every weight: processes that sum gradients must all have one."""
    return x_RD + sum(t.flatten()[:0].sum() for t in weights if t is not None)


@cache
def _layer(given: Arguments) -> Any:
    """`ParallelDroplessMLP` without memory of its own. It keeps no load-balancing loss: the router's losses are ours."""
    return importlib.import_module("megablocks.layers.dmoe").ParallelDroplessMLP(_package_arguments(given))


@cache
def _grouped(given: Arguments) -> Any:
    """`GroupedMLP` or `GroupedGLU` without memory of its own."""
    module, name = ("glu", "GroupedGLU") if given.gated else ("mlp", "GroupedMLP")
    return getattr(importlib.import_module(f"megablocks.layers.{module}"), name)(_package_arguments(given))


def _package_arguments(given: Arguments) -> Any:
    return importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=given.hidden,
        ffn_hidden_size=given.width,
        moe_num_experts=given.experts,
        moe_top_k=given.top_k,
        activation_fn=ACTIVATIONS[given.activation].value,
        mlp_type="glu" if given.gated else "mlp",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        moe_loss_weight=0.0,
        fp16=False,
        bf16=True,
        device=torch.device("meta"),
        init_method=_leave,
        output_layer_init_method=_leave,
    )


def _leave(weight: Tensor) -> None:
    """No new values: the weights are given with every call."""
