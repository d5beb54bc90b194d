"""A model's layers with slots in place of their experts, and what belongs to all of them together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from megatron.config.disk import explained
from megatron.config.expert_offload import ExpertOffload, bytes_of
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.inference.offload.counters import Counters, counters_table, total
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.experts import SlottedExperts
from megatron.inference.offload.in_place import InPlaceExperts
from megatron.inference.offload.layer import LayerSlots, SlabMemory
from megatron.inference.offload.lores import PagedMemory, SlottedLores
from megatron.inference.offload.policies import POLICIES, Static, Steps
from megatron.inference.offload.reader import Reader
from megatron.inference.offload.record import Recorder
from megatron.inference.offload.store import HostTier, Store, Throttled, Tier
from megatron.inference.offload.table import SlotTable
from megatron.inference.offload.units import LayerUnits, align, build_for, moe_layers
from megatron.model.gpt import GPT
from megatron.model.moe.layer import MoELayer
from megatron.monitor.routing_trace import write_trace

Slotted = SlottedExperts | SlottedLores


@dataclass
class Offloaded:
    """What a running model needs: files, threads and the layers with slots, by layer."""

    options: ExpertOffload
    store: Store
    reader: Reader
    layers: Mapping[int, Slotted]
    slots: int
    """Of each layer that has as many units."""
    recorder: Recorder | None = None
    """None: the routing is not recorded."""

    @property
    def counters(self) -> dict[int, Counters]:
        """By layer; they go on counting."""
        return {layer: part.slots.counters for layer, part in self.layers.items()}

    def content(self) -> dict[str, Any]:
        """Everything that was counted, for JSON."""
        return {
            "policy": self.options.policy,
            "granularity": self.options.granularity,
            "slots": self.slots,
            "prefetch": self.options.prefetch,
            "misses": self.options.misses,
            "total": total(self.counters).content(),
            "layers": {str(layer): counters.content() for layer, counters in self.counters.items()},
        }

    def finish(self, console: Console) -> None:
        """At the end of a run: shows what was counted, and writes the files that the options name. Raises OffloadError and TraceError."""
        console.print(counters_table(self.counters))
        if self.options.counters is not None:
            path = Path(self.options.counters)
            try:
                path.write_text(json.dumps(self.content(), indent=1) + "\n")
            except OSError as error:
                raise OffloadError(f"expert_offload.counters: {path} cannot be written: {explained(error, path)}.") from error
        if self.recorder is not None and self.options.record is not None:
            write_trace(Path(self.options.record), self.recorder.trace())


@dataclass(frozen=True)
class Plan:
    """How the layers of one model are given slots."""

    options: ExpertOffload
    model: ModelConfig
    sections: Mapping[int, MoEConfig]
    """Layer -> its section."""
    units: Mapping[int, LayerUnits]
    slots: int
    steps: Mapping[int, Steps]
    """Layer -> its steps in the trace that the options name; empty: there is none."""


def put_slots(gpt: GPT, store: Store, plan: Plan) -> Offloaded:
    """Replaces the experts of every MoE layer, whose own parameters need no memory and no numbers. Raises OffloadError."""
    reader = Reader(plan.options.readers)
    tier = _tier(store, plan.options)
    weight = next(gpt.parameters())
    layers: dict[int, Slotted] = {}
    for number, moe_layer in moe_layers(gpt).items():
        units = plan.units[number]
        slots = min(plan.slots, units.units)
        table = SlotTable(slots, POLICIES[plan.options.policy](plan.steps.get(number, ())))
        if plan.options.granularity == "lore":
            memory = PagedMemory(moe_layer.experts, units.names, units.units)
            layers[number] = SlottedLores(moe_layer.experts, LayerSlots(number, table, memory, tier, reader))
        else:
            layers[number] = _slotted(plan, number, table, weight, (tier, reader, store))
        moe_layer.experts = layers[number]
    if plan.options.policy == "static":
        for part in layers.values():
            part.slots.preload(cast(Static, part.slots.table.policy).hottest(_units(part), part.slots.table.slots))
    if plan.options.prefetch:
        connect(moe_layers(gpt))
    recorder = Recorder(moe_layers(gpt)) if plan.options.record is not None else None
    return Offloaded(plan.options, store, reader, layers, plan.slots, recorder)


def _slotted(plan: Plan, number: int, table: SlotTable, weight: Tensor, beside: tuple[Tier, Reader, Store]) -> SlottedExperts:
    tier, reader, store = beside
    section, units = plan.sections[number], plan.units[number]
    count = max(2, table.slots)  # a product of one group is computed in another way, with other rounding
    slab = build_for(plan.model, section, count, dtype=weight.dtype, device=weight.device)
    if weight.device.type == "cpu":
        align(slab)
    slots = LayerSlots(number, table, SlabMemory(slab, units.names, count), tier, reader)
    if plan.options.misses == "in_place":
        pair = build_for(plan.model, section, 2, dtype=weight.dtype, device=weight.device)
        return InPlaceExperts(slab, slots, section.num_experts, pair, store)
    return SlottedExperts(slab, slots, section.num_experts)


def _tier(store: Store, options: ExpertOffload) -> Tier:
    bandwidth, capacity = (None if text is None else bytes_of(text) for text in (options.bandwidth, options.host_memory))
    tier: Tier = store if bandwidth is None else Throttled(store, bandwidth)
    return tier if capacity is None else HostTier(tier, capacity, pinned=torch.cuda.is_available())


def _units(part: Slotted) -> int:
    return part.num_lores if isinstance(part, SlottedLores) else part.num_experts


def connect(layers: Mapping[int, MoELayer]) -> None:
    """Lets each MoE layer ask the next one's router early (Eliseev and Mazur, 2023; "Fate" does the same with the gate's input)."""
    numbers = sorted(layers)
    for here, there in itertools.pairwise(numbers):
        cast(Any, layers[here].experts).ahead = _Ahead(layers[there])


class _Ahead:
    """Asks the router of the next layer with this layer's rows."""

    def __init__(self, following: MoELayer) -> None:
        self.following = following

    def __call__(self, hidden_ND: Tensor) -> None:
        part = cast(Slotted, self.following.experts)
        routing = self.following.router.forward(hidden_ND)
        if isinstance(part, SlottedLores):
            x_RD, plan = cast(Any, self.following.dispatcher).dispatch(hidden_ND, routing)
            _, lores = part.inner.lores(x_RD, plan.rows_E)
            part.slots.prefetch([unit for units in part.needed(lores, plan.rows_E.tolist()).values() for unit in units])
        else:
            part.slots.prefetch(_likeliest(routing.expert_TK, part.num_experts))


def _likeliest(expert_TK: Tensor, num_experts: int) -> Sequence[int]:
    """The experts that most rows choose first; of equals those of the first places."""
    counts: dict[int, int] = {}
    for expert in expert_TK.t().reshape(-1).tolist():
        if expert < num_experts:
            counts[expert] = counts.get(expert, 0) + 1
    return sorted(counts, key=lambda expert: -counts[expert])
