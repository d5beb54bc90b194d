"""The cost of the LoREs: the experts of a StructMoE layer, with their routers, over plain experts of the same width, as our model builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron.config import config_from_dict
from megatron.config.components import EXPERTS, resolve_component
from megatron.kernels.backends import OPS
from megatron.model.initialization import build_initializer
from moe_bench.libraries import with_backward
from moe_bench.machine import Call
from moe_bench.rounds import measure, ratio
from moe_bench.shapes import DTYPES, Shape


class LayerCost(NamedTuple):
    """Of one shape, forward + backward."""

    implementation: str
    dtype: str
    shape: str
    structmoe_ms: float | None
    plain_ms: float | None
    ratio: float | None
    """StructMoE's time over the plain one's: the median of the rounds. None: one of them did not run."""


def build_experts(shape: Shape, dtype: torch.dtype, device: str, *, structmoe: bool, implementation: str) -> nn.Module:
    """The module of our model, without router and dispatch."""
    model = {"num_layers": 1, "hidden_size": shape.width_in, "num_attention_heads": 1, "intermediate_size": shape.width_out, "activation": "gelu"}
    moe = {"moe_num_experts": shape.experts, "moe_top_k": shape.top_k, "kernel_backends": dict.fromkeys(OPS, implementation)}
    lores = {"moe_expert_type": "structmoe", "moe_num_lores": shape.lores, "moe_lore_rank": shape.rank, "moe_lore_top_k": shape.lore_top_k}
    run = {"seq_length": 16, "max_position_embeddings": 16, "train_iters": 1, "train_micro_batch_size_per_gpu": 1}
    config = config_from_dict({**model, **run, **moe, **(lores if structmoe else {})})
    experts: nn.Module = resolve_component(EXPERTS, config.moe.moe_expert_type)(config.model, config.moe, build_initializer(config.model, 1))
    return experts.to(device, dtype)


def candidate(module: nn.Module, shape: Shape, dtype: torch.dtype, device: str) -> Callable[[int], Call]:
    """Forward and backward on rows that are spread over the experts by chance."""

    def build(tokens: int) -> Call:
        generator = torch.Generator().manual_seed(1)
        expert_R = torch.randint(shape.experts, (tokens * shape.top_k,), generator=generator)
        rows_E = torch.bincount(expert_R, minlength=shape.experts).to(device)
        x_RD = torch.randn(len(expert_R), shape.width_in, generator=generator).to(device, dtype).requires_grad_()
        forward: Any = lambda: module(x_RD, rows_E)[0]  # noqa: E731 the call of the module, again and again
        return with_backward(forward, [x_RD, *module.parameters()])

    return build


def layer_costs(shapes: list[tuple[Shape, str]], *, rounds: int, budget: float, device: str) -> list[LayerCost]:
    """Of every shape that has LoREs: with the implementations that `auto` takes, and with the reference."""
    rows = []
    for shape, dtype in shapes:
        if not shape.lores:
            continue
        kinds = [(implementation, structmoe) for implementation in ("auto", "reference") for structmoe in (True, False)]
        candidates = {
            f"{implementation} {structmoe}": candidate(
                build_experts(shape, DTYPES[dtype], device, structmoe=structmoe, implementation=implementation), shape, DTYPES[dtype], device
            )
            for implementation, structmoe in kinds
        }
        times = measure(candidates, shape.tokens, rounds=rounds, budget=budget, device=device)
        for implementation in ("auto", "reference"):
            structmoe, plain = times[f"{implementation} True"], times[f"{implementation} False"]
            rows.append(LayerCost(implementation, dtype, shape.name, structmoe.milliseconds, plain.milliseconds, ratio(structmoe, plain)))
    return rows
