"""The weights that a configuration asks for, with their shapes: nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.names import is_derived
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Read
from megatron.model.gpt import GPT
from megatron.model.initialization import build_initializer


class Wanted(NamedTuple):
    """What a configuration asks of one weight."""

    shape: tuple[int, ...]
    whole: bool
    """Whether its numbers are whole (the k of SMoE-Dropout's routers)."""


Shapes = Mapping[str, Wanted]


def model_shapes(source: Source) -> Shapes:
    """Name -> shape of every weight and buffer that training changes."""
    with torch.device("meta"):
        gpt = GPT(source.config.model, source.config.moe, source.vocabulary, build_initializer(source.config.model, 0))
    return {name: Wanted(tuple(tensor.shape), not tensor.is_floating_point()) for name, tensor in gpt.state_dict().items() if not is_derived(name)}


def checked(name: str, tensor: Tensor, shapes: Shapes) -> Tensor:
    """The tensor. Raises ConversionError where its shape or its kind of number is not what the configuration asks for."""
    wanted = shapes.get(name)
    if wanted is None or wanted.shape != tuple(tensor.shape):
        needed = "nothing" if wanted is None else list(wanted.shape)
        raise ConversionError(
            f"{name} has the shape {list(tensor.shape)}, but the configuration needs {needed}: the weights belong to another model."
        )
    if tensor.is_floating_point() == wanted.whole:
        must = "it must hold whole numbers" if wanted.whole else "weights must be floating-point numbers"
        raise ConversionError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, but {must}.")
    return tensor


def checked_read(read: Read, shapes: Shapes) -> Read:
    """`read` that raises ConversionError for a weight of another shape or kind of number."""
    return lambda name: checked(name, read(name), shapes)
