"""What routers chose, layer by layer, as the arrays of a trace.

Shapes: T tokens; L layers with experts; K experts of a token; U LoREs of a token in one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.model.moe.routing import Chosen

Choices = npt.NDArray[Any]
"""Integers; -1 where there is none."""
Weights = npt.NDArray[np.float32]


class LayerChoices(NamedTuple):
    """One layer's choices, in the order in which the model made them."""

    expert_TK: Choices
    weight_TK: Weights
    lore_TKU: Choices | None = None
    """None: the layer has none."""


class Routed(NamedTuple):
    """The choices for some tokens, the one with the largest weight first."""

    expert_TLK: Choices
    """int32; -1 where a token uses fewer."""
    weight_TLK: Weights
    lore_TLKU: Choices | None
    """The LoREs inside each chosen expert; -1 where there is none. None: no layer has LoREs that are chosen."""


def choices_of(layer: Chosen) -> LayerChoices:
    """The same as NumPy arrays."""
    return LayerChoices(layer.expert_TK.numpy(), layer.weight_TK.numpy(), None if layer.lore_TKL is None else layer.lore_TKL.numpy())


def joined(layers: Sequence[LayerChoices]) -> Routed:
    """The layers together, each by weight. Layers with fewer choices than others are filled with -1. `layers` is not empty."""
    top_k = max(layer.expert_TK.shape[1] for layer in layers)
    lores_per_token = max(0 if layer.lore_TKU is None else layer.lore_TKU.shape[2] for layer in layers)
    tokens = len(layers[0].expert_TK)
    expert_TLK = np.full((tokens, len(layers), top_k), -1, np.int32)
    weight_TLK = np.zeros((tokens, len(layers), top_k), np.float32)
    lore_TLKU = np.full((tokens, len(layers), top_k, lores_per_token), -1, np.int32) if lores_per_token else None
    for place, layer in enumerate(layers):
        expert_TK, weight_TK, lore_TKU = by_weight(layer)
        width = expert_TK.shape[1]
        expert_TLK[:, place, :width], weight_TLK[:, place, :width] = expert_TK, weight_TK
        if lore_TLKU is not None and lore_TKU is not None:
            lore_TLKU[:, place, :width, : lore_TKU.shape[2]] = lore_TKU
    weight_TLK[expert_TLK < 0] = 0
    return Routed(expert_TLK, weight_TLK, lore_TLKU)


def by_weight(layer: LayerChoices) -> LayerChoices:
    """The largest weight first, places without an expert last. Of equal weights the order stays."""
    key_TK = np.where(layer.expert_TK < 0, np.inf, -layer.weight_TK.astype(np.float64))
    order_TK = key_TK.argsort(1, kind="stable")
    lores = None if layer.lore_TKU is None else np.take_along_axis(layer.lore_TKU, order_TK[..., None], 1)
    return LayerChoices(np.take_along_axis(layer.expert_TK, order_TK, 1), np.take_along_axis(layer.weight_TK, order_TK, 1), lores)
