"""Records which experts and LoREs a model's tokens use, whatever computes them.

Shapes: T tokens of one call; L layers with experts; K experts per token; M LoREs per expert and token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.trace import Numbers, Trace
from megatron.inference.routing_trace import RoutingTrace
from megatron.kernels.permute import sort_by_group
from megatron.model.moe.dispatch.local import Computed, LocalPlan
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.routing import LoreRouting, Routing


class Recorder:
    """Stands between the layers of a model and their dispatchers until `stop`."""

    def __init__(self, layers: Mapping[int, MoELayer]) -> None:
        self._layers = layers
        self._experts: dict[int, list[Numbers]] = {number: [] for number in self._layers}
        self._lores: dict[int, list[Numbers]] = {number: [] for number in self._layers}
        self._lengths: list[int] = []
        self._first = min(self._layers)
        for number, layer in self._layers.items():
            layer.dispatcher = cast(Any, _Watched(layer.dispatcher, self, number))

    def add(self, layer: int, routing: Routing, lores: LoreRouting | None, num_experts: int) -> None:
        """A call of a layer."""
        if layer == self._first:
            self._lengths.append(len(routing.expert_TK))
        expert_TK = routing.expert_TK.cpu()
        if routing.padded:
            expert_TK = expert_TK.masked_fill(expert_TK >= num_experts, -1)
        self._experts[layer].append(expert_TK.numpy().astype(np.int64))
        if lores is not None:
            self._lores[layer].append(_by_token(routing, lores, num_experts).cpu().numpy().astype(np.int64))

    def clear(self) -> None:
        """Forgets what was recorded so far."""
        self._lengths.clear()
        for entries in (*self._experts.values(), *self._lores.values()):
            entries.clear()

    def stop(self) -> None:
        """Takes the recorder out of the model."""
        for layer in self._layers.values():
            if isinstance(layer.dispatcher, _Watched):
                layer.dispatcher = layer.dispatcher.inner

    def trace(self) -> Trace:
        """What was recorded. Raises OffloadError where nothing was."""
        numbers = sorted(self._layers)
        if not self._lengths:
            raise OffloadError("No token was generated, so there is no routing to record.")
        step_T = np.repeat(np.arange(len(self._lengths), dtype=np.int64), self._lengths)
        expert_TLK = _stacked([np.concatenate(self._experts[number]) for number in numbers])
        count = max(layer.context.num_experts for layer in self._layers.values())
        if not all(self._lores.values()):
            return Trace(step_T, numbers, expert_TLK, count)
        lore_TLKM = np.stack([np.concatenate(self._lores[number]) for number in numbers], 1)
        inner = max(cast(int, layer.experts.num_lores) // layer.context.num_experts for layer in self._layers.values())
        return Trace(step_T, numbers, expert_TLK, count, lore_TLKM, inner)


def trace_of_calls(calls: RoutingTrace, layers: Mapping[int, MoELayer]) -> Trace:
    """What a runner says about its calls, whichever runner it is. `layers`: the model's, by number. Raises OffloadError where there was no call."""
    if not calls.calls:
        raise OffloadError("No token was generated, so there is no routing to record.")
    lengths = [len(call[0].expert_TK) for call in calls.calls]
    step_T = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    chosen = calls.layers()
    expert_TLK = _stacked([layer.expert_TK.cpu().numpy().astype(np.int64) for layer in chosen])
    count = max(layer.context.num_experts for layer in layers.values())
    lores = [layer.lore_TKL.cpu().numpy().astype(np.int64) for layer in chosen if layer.lore_TKL is not None]
    if len(lores) < len(chosen):
        return Trace(step_T, sorted(layers), expert_TLK, count)
    inner = max(cast(int, layer.experts.num_lores) // layer.context.num_experts for layer in layers.values())
    return Trace(step_T, sorted(layers), expert_TLK, count, np.stack(lores, 1), inner)


class _Watched:
    """A dispatcher whose decisions are written down."""

    def __init__(self, inner: Any, recorder: Recorder, layer: int) -> None:
        self.inner, self._recorder, self._layer = inner, recorder, layer
        self.num_experts: int = inner.num_experts

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        """Dispatch, experts, combine."""
        computed: Computed = self.inner.run(x_TD, routing, experts)
        self._recorder.add(self._layer, routing, computed.lores, self.num_experts)
        return computed

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, LocalPlan]:
        """(x_RD sorted by expert, plan); nothing is written down."""
        dispatched: tuple[Tensor, LocalPlan] = self.inner.dispatch(x_TD, routing)
        return dispatched


def _by_token(routing: Routing, lores: LoreRouting, num_experts: int) -> Tensor:
    """lore_TKM; -1 where a token uses fewer experts."""
    order = routing.softmax.order if routing.softmax is not None else sort_by_group(routing.expert_TK, num_experts, padded=routing.padded)
    padded_RM = torch.cat([lores.lore_RL, lores.lore_RL.new_full((1, lores.lore_RL.shape[1]), -1)])
    return padded_RM[order.inverse_TK]


def _stacked(by_layer: list[Numbers]) -> Numbers:
    """expert_TLK, with -1 where a layer's router chooses fewer experts."""
    width = max(each.shape[1] for each in by_layer)
    return np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=-1) for each in by_layer], 1)
