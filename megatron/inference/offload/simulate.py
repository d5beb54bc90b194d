"""A routing trace through any policy and number of slots, without the model. The bookkeeping is the engine's own, so the hits are, too."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.inference.offload.counters import Counters
from megatron.inference.offload.policies import POLICIES, Static, Steps
from megatron.inference.offload.table import SlotTable, too_few
from megatron.monitor.routing_trace import Trace


def simulate(
    trace: Trace, *, policy: str, slots: int, granularity: str = "expert", profile: Trace | None = None, in_place: bool = False
) -> dict[int, Counters]:
    """Layer -> what the engine would count, all but bytes and seconds. `profile`: the trace that static learns from; None: the same.

    `in_place`: experts that are in no slot are computed where they rest. Raises OffloadError where the slots do not suffice.
    """
    lores = granularity == "lore"
    if not lores and not in_place and slots < (most := int((trace.expert_TLK >= 0).sum(-1).max())):
        raise too_few(most, slots)
    found: dict[int, Counters] = {}
    for layer in trace.layers:
        blocks = trace.blocks(layer) if lores else [[[unit] for unit in step] for step in trace.steps(layer)]
        known = trace if policy == "belady" or profile is None else profile
        units = trace.num_experts * (trace.num_lores if lores else 1)
        table = _table(policy, min(slots, units), known.steps(layer, granularity=granularity), units)
        for step in blocks:
            if in_place:
                count_in_place(table, [unit for block in step for unit in block])
            else:
                replay(table, step)
        found[layer] = table.counters
    return found


def replay(table: SlotTable, blocks: Sequence[Sequence[int]]) -> None:
    """One call."""
    for group in table.begin(blocks):
        table.select([unit for number in group for unit in blocks[number]])
    table.end()


def count_in_place(table: SlotTable, needed: Sequence[int]) -> list[int]:
    """One call whose experts do not move; those that are resident."""
    resident = [unit for unit in needed if unit in table.slot_of]
    counters = table.counters
    counters.calls += 1
    counters.selections += len(needed)
    counters.hits += len(resident)
    counters.in_place += len(needed) - len(resident)
    return resident


def _table(policy: str, slots: int, steps: Steps, units: int) -> SlotTable:
    table = SlotTable(slots, POLICIES[policy](steps))
    if isinstance(table.policy, Static):
        table.preload(table.policy.hottest(units, slots))
    return table
