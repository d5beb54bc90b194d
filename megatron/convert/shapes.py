"""The weights that a configuration asks for, with their shapes: nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.checkpoint.names import is_derived
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Read
from megatron.model.gpt import GPT
from megatron.model.initialization import build_initializer

Shapes = Mapping[str, tuple[int, ...]]


def model_shapes(source: Source) -> Shapes:
    """Name -> shape of every weight and buffer that training changes."""
    with torch.device("meta"):
        gpt = GPT(source.config.model, source.config.moe, source.vocabulary, build_initializer(source.config.model, 0))
    return {name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items() if not is_derived(name)}


def checked(name: str, tensor: Tensor, shapes: Shapes) -> Tensor:
    """The tensor. Raises ConversionError where its shape is not the one that the configuration asks for, or its numbers are whole."""
    if shapes.get(name) != tuple(tensor.shape):
        wanted = list(shapes[name]) if name in shapes else "nothing"
        raise ConversionError(
            f"{name} has the shape {list(tensor.shape)}, but the configuration needs {wanted}: the weights belong to another model."
        )
    if not tensor.is_floating_point():
        raise ConversionError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, but weights must be floating-point numbers.")
    return tensor


def checked_read(read: Read, shapes: Shapes) -> Read:
    """`read` that raises ConversionError for a weight of another shape."""
    return lambda name: checked(name, read(name), shapes)
