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
from megatron.monitor.trace_layers import choices_of, joined


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
        routed = joined([choices_of(layer) for layer in layers])
        resting_TLK = routed.expert_TLK < np.array(self._counts)[:, None]  # an expert without weights rests nowhere
        self._experts.append(np.where(resting_TLK, routed.expert_TLK, -1).astype(np.int64))
        if routed.lore_TLKU is not None:
            self._lores.append(routed.lore_TLKU.astype(np.int64))

    def trace(self) -> Trace:
        """What was recorded: each call is a step. Raises OffloadError where nothing was."""
        if not self._experts:
            raise OffloadError("No token was generated, so there is no routing to record.")
        step_T = np.repeat(np.arange(len(self._experts), dtype=np.int64), [len(call) for call in self._experts])
        trace = Trace(step_T, sorted(self._layers), np.concatenate(self._experts), max(self._counts), experts_L=self._counts)
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
