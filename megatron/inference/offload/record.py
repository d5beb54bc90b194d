"""Records which experts and LoREs a model's tokens use, from what a runner says about its calls.

Shapes: T tokens of one call; L layers with experts; K experts per token; M LoREs per expert and token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from megatron.inference.offload.errors import OffloadError
from megatron.inference.routing_trace import RoutingTrace
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.routing import Chosen
from megatron.monitor.routing_trace import Numbers, Trace


class Recorder:
    """Keeps the numbers of the experts of each call, and nothing else."""

    def __init__(self, layers: Mapping[int, MoELayer]) -> None:
        """`layers`: the model's, by number."""
        self._layers = layers
        self._counts = [layers[number].context.num_experts - layers[number].context.num_zero_computation for number in sorted(layers)]
        self._experts: list[Numbers] = []
        self._lores: list[Numbers] = []

    def add(self, layers: Sequence[Chosen]) -> None:
        """The tokens of one pass through the model: what each MoE layer chose for them."""
        self._experts.append(_stacked([_with_weights(each, own) for each, own in zip(layers, self._counts, strict=True)]))
        lores = [layer.lore_TKL.numpy() for layer in layers if layer.lore_TKL is not None]
        if len(lores) == len(layers):
            self._lores.append(np.stack(lores, 1))

    def trace(self) -> Trace:
        """What was recorded: each call is a step. Raises OffloadError where nothing was."""
        if not self._experts:
            raise OffloadError("No token was generated, so there is no routing to record.")
        step_T = np.repeat(np.arange(len(self._experts), dtype=np.int64), [len(call) for call in self._experts])
        trace = Trace(step_T, sorted(self._layers), np.concatenate(self._experts), max(self._counts))
        if not self._lores:
            return trace
        lores = [cast(int, self._layers[number].experts.num_lores) for number in sorted(self._layers)]
        inner = max(of_layer // count for of_layer, count in zip(lores, self._counts, strict=True))
        return trace._replace(lore_TLKM=np.concatenate(self._lores), num_lores=inner)


def trace_of_calls(calls: RoutingTrace, layers: Mapping[int, MoELayer]) -> Trace:
    """The trace of calls that were kept whole. `layers`: the model's, by number. Raises OffloadError where there was no call."""
    recorder = Recorder(layers)
    for call in calls.calls:
        recorder.add(call)
    return recorder.trace()


def _with_weights(layer: Chosen, count: int) -> Numbers:
    """expert_TK of a layer with `count` experts that have weights; -1 for the others, which rest nowhere."""
    expert_TK: Numbers = layer.expert_TK.numpy()
    return np.where(expert_TK < count, expert_TK, -1)


def _stacked(by_layer: list[Numbers]) -> Numbers:
    """expert_TLK, with -1 where a layer's router chooses fewer experts."""
    width = max(each.shape[1] for each in by_layer)
    return np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=-1) for each in by_layer], 1)
