"""Whole gradients, weights and optimizer averages, even if ZeRO divides them among processes. Every process must call these functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.mpu.gradients import marks_of
from megatron.mpu.groups import current_groups


def whole_gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient of each parameter that has one, averaged over micro-batches and processes, before clipping and without the loss scale.

    Read them after the last backward pass of a step and before its update. Only one gradient is gathered at a time.
    """
    from deepspeed.utils import safe_get_full_grad

    scale = engine.optimizer.cur_scale if engine.fp16_enabled() else 1.0
    own = getattr(engine.optimizer, "gradient", None)  # MasterWeights has them
    for name, parameter in engine.module.named_parameters():
        gradient = (own or safe_get_full_grad)(parameter) if parameter.requires_grad else None
        if gradient is not None:
            yield name, gradient if scale == 1.0 else gradient.float() / scale


def whole_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        yield name, safe_get_full_fp32_param(parameter) if hasattr(parameter, "ds_id") else parameter.detach()


def counted_gradients(engine: Any) -> Iterator[Tensor]:
    """`whole_gradients` of the weights that no earlier pipeline stage has as well."""
    copies = {name for name, parameter in engine.module.named_parameters() if marks_of(parameter).ds_pipe_replicated}
    yield from (gradient for name, gradient in whole_gradients(engine) if name not in copies)


def over_stages(own: Mapping[str, float], *, added: bool = False) -> dict[str, float]:
    """The numbers of all pipeline stages. Of one that several have, that of the first, or their sum if `added`. Collective."""
    pipe = current_groups().pipe
    stages: list[Mapping[str, float]] = [own] * pipe.size
    if pipe.size > 1:
        torch.distributed.all_gather_object(stages, own, group=pipe.handle)
    found: dict[str, float] = {}
    for numbers in stages:
        for name, number in numbers.items():
            found[name] = found.get(name, 0.0) + number if added else found.get(name, number)
    return found


def optimizer_state_norms(engine: Any) -> dict[str, Tensor]:
    """`<group>_<average>` -> its norm over all parameters of that group (0: those that decay) and all processes, except averages of 8 bits.

    With ZeRO 1 a weight that several pipeline stages have counts once for each of them.
    """
    squares: dict[str, Tensor] = {}
    for group, parameter, state in _states(engine.optimizer):
        for name, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.numel() == parameter.numel() > 1:
                key = f"{group}_{name}"
                squares[key] = squares.get(key, torch.zeros((), device=value.device)) + value.float().square().sum()
    groups = current_groups()
    if squares and (int(engine.zero_optimization_stage()) > 0 or groups.model.size > 1):
        together = torch.stack(list(squares.values()))
        together = groups.model.sum(groups.data.sum(together) if int(engine.zero_optimization_stage()) > 0 else together)
        squares = dict(zip(squares, together, strict=True))
    return {key: value.sqrt() for key, value in squares.items()}


def _states(optimizer: Any) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Group, parameter (or ZeRO's part of several) and state of what this process updates, but for copies of another stage's weights."""
    inner = getattr(optimizer, "optimizer", optimizer)
    copies = {id(own) for own, weight in zip(*_weights_and_own(optimizer), strict=True) if marks_of(weight).ds_pipe_replicated}
    if hasattr(optimizer, "sub_group_to_group_id"):  # ZeRO 3 hands its parts to the optimizer one after the other
        parts = [(optimizer.sub_group_to_group_id[number], part) for number, part in enumerate(optimizer.fp32_partitioned_groups_flat)]
    else:
        parts = [(number, parameter) for number, group in enumerate(inner.param_groups) for parameter in group["params"]]
    counted = [(number, part) for number, part in parts if part in inner.state and id(part) not in copies]
    yield from ((number, part, inner.state[part]) for number, part in counted)


def _weights_and_own(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """At ZeRO stage 0, what the optimizer updates, and the model's weights for it, in the same order."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return own, getattr(optimizer, "weights", own)
