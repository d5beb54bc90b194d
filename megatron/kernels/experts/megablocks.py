"""The expert layer by MegaBlocks (Gale et al., 2022): the package's dropless experts, `ParallelDroplessMLP`, on grouped products.

The package keeps matrices as we do, [E*F, D] for both products. Its names differ: in its gated experts `w1` is the projection with the activation,
our gate, and `v1` is our up-projection.

What it cannot do: LoREs, products of thin matrices, biases of experts, tokens with fewer than K experts, and other formats than bfloat16 (the package
grouped_gemm multiplies in no other). The configuration refuses those. It waits for the device once a layer, to read the row counts.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

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
    """The package's layer, called with our weights."""

    def compute(self, x_TD: Tensor, choices: Choices, weights: ExpertWeights, activation: str) -> Tensor:
        """y_TD. The gradients are the package's own; that of `weight_TK` is rounded to the format of x."""
        if len(x_TD) == 0:  # its kernels do not start without tokens
            return x_TD * 1
        experts, width, hidden = weights.up_EFD.shape
        layer = _layer(hidden, width, experts, choices.expert_TK.shape[1], activation, weights.gate_EFD is not None)
        first = weights.up_EFD if weights.gate_EFD is None else weights.gate_EFD
        named = {"mlp.w1": first, "mlp.w2": weights.down_EFD} | ({} if weights.gate_EFD is None else {"mlp.v1": weights.up_EFD})
        parameters = {name: t.reshape(-1, hidden) for name, t in named.items()}
        y_1TD: Tensor = functional_call(layer, parameters, (x_TD[None].contiguous(), None, choices.weight_TK, choices.expert_TK))
        return y_1TD[0]


@cache
def _layer(hidden: int, width: int, experts: int, top_k: int, activation: str, gated: bool) -> Any:
    """`ParallelDroplessMLP` without memory of its own. It keeps no load-balancing loss: the router's losses are ours."""
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=hidden,
        ffn_hidden_size=width,
        moe_num_experts=experts,
        moe_top_k=top_k,
        activation_fn=ACTIVATIONS[activation].value,
        mlp_type="glu" if gated else "mlp",
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
    return importlib.import_module("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)


def _leave(weight: Tensor) -> None:
    """No new values: the weights are given with every call."""
