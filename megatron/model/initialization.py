"""Initial weights: NeoX's methods by name, drawn from one generator so that a seed gives the same model wherever it is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

Fill = Callable[[Tensor], None]
"""Fills one matrix in place."""
Draw = Callable[..., Tensor]
"""One of PyTorch's initialisers: (matrix, generator=)."""


class UnknownInitMethod(ValueError):
    """An init method name that is not known."""


@dataclass(frozen=True)
class Initializer:
    """How the matrices of a model start. Biases start at 0, norms at 1."""

    into: Fill
    """Embeddings, head, routers and projections into a layer (`init_method`)."""
    out: Fill
    """Projections that write to the residual stream (`output_layer_init_method`)."""
    xavier_normal: Fill
    """Tables of relative positions, whatever the config says, as in NeoX."""
    normal: Callable[[float], Fill]
    """A plain normal distribution of the given standard deviation."""


def build_initializer(model: ModelConfig, seed: int) -> Initializer:
    """All fills draw from one generator; raises UnknownInitMethod."""
    generator = torch.Generator().manual_seed(seed)
    into, out, xavier = (_fill(method, model, generator) for method in (model.init_method, model.output_layer_init_method, "xavier_normal"))

    def normal(std: float) -> Fill:
        return _drawn(partial(nn.init.normal_, mean=0.0, std=std), generator)

    return Initializer(into, out, xavier, normal)


def fill_each(fill: Fill, matrix: Tensor, count: int) -> None:
    """Fill `count` matrices stacked along the first dimension one by one, as if each were a parameter of its own."""
    for part in matrix.chunk(count):
        fill(part)


def zeros(matrix: Tensor) -> None:
    """Fill with 0."""
    nn.init.zeros_(matrix)


def standard_deviation(method: str, model: ModelConfig) -> float:
    """The standard deviation of the methods that are plain normal distributions (NeoX's names). Raises UnknownInitMethod."""
    width, layers, std = model.hidden_size, model.num_layers, model.init_method_std
    known = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * layers),
        "single_residual_scaled_normal": std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / (layers * math.sqrt(width)),
    }
    if method not in known:
        raise UnknownInitMethod(f"init method '{method}': must be one of {', '.join(sorted([*known, *_drawing_methods(model)]))}")
    return known[method]


def _drawing_methods(model: ModelConfig) -> dict[str, Draw]:
    """The methods that look at the shape of the matrix."""
    return {
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
        "orthogonal": partial(nn.init.orthogonal_, gain=math.sqrt(2)),
        "scaled_orthogonal": partial(nn.init.orthogonal_, gain=math.sqrt(2 / model.num_layers)),
    }


def _fill(method: str, model: ModelConfig, generator: torch.Generator) -> Fill:
    draw = _drawing_methods(model).get(method)
    if draw is None:
        draw = partial(nn.init.normal_, mean=0.0, std=standard_deviation(method, model))
    return _drawn(draw, generator)


def _drawn(draw: Draw, generator: torch.Generator) -> Fill:
    def fill(matrix: Tensor) -> None:
        draw(matrix, generator=generator)

    return fill
