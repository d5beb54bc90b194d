"""Which unit is in which slot of a layer: bookkeeping without tensors, files or threads. The engine and the simulator share it, so that what the
simulator predicts is what the engine does.

A call of the layer is `begin` with all units that it needs, then `select` for the units of one group after the other (one group where they fit),
then `end`. The units of the group that is being computed are pinned: they are not among those that a policy may take a slot from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron.inference.offload.counters import Counters
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.policies import Policy


class Move(NamedTuple):
    """A unit that has to be read into a slot."""

    unit: int
    slot: int


class SlotTable:
    """The slots of one layer. `counters` are filled as calls go by, all but bytes and seconds."""

    def __init__(self, slots: int, policy: Policy) -> None:
        self.slots, self.policy, self.counters = slots, policy, Counters()
        self.slot_of: dict[int, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._touched: set[int] = set()
        """Slots that ever held a unit."""
        self._prefetched: set[int] = set()
        self._needed: Sequence[int] = ()

    def begin(self, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
        """The groups of blocks, by their numbers, in which a call is to be computed. A block is the (different) units that are needed together; a
        group needs at most `slots` units. Blocks whose units are all in slots come first. Raises OffloadError for a block that does not fit."""
        self._needed = [unit for block in blocks for unit in block]
        if (most := max(map(len, blocks), default=0)) > self.slots:
            raise too_few(most, self.slots)
        self.policy.begin(self._needed)
        self.counters.calls += 1
        groups, room = list[list[int]](), 0
        for number in sorted(range(len(blocks)), key=lambda number: any(unit not in self.slot_of for unit in blocks[number])):
            if len(blocks[number]) > room:
                groups.append([])
                room = self.slots
            groups[-1].append(number)
            room -= len(blocks[number])
        return [sorted(group) for group in groups]

    def select(self, group: Sequence[int]) -> list[Move]:
        """What has to be read so that all of the group is in slots. Raises OffloadError for more units than slots."""
        if len(group) > self.slots:
            raise too_few(len(group), self.slots)
        missing = [unit for unit in group if unit not in self.slot_of]
        used = self._prefetched.intersection(group)
        self._prefetched -= used
        counters = self.counters
        counters.selections += len(group)
        counters.hits += len(group) - len(missing)
        counters.loads += len(missing)
        counters.prefetches_used += len(used)
        return self._take_slots(missing, pinned=group)

    def end(self) -> None:
        """The call is over."""
        self.counters.prefetches_wasted += len(self._prefetched)
        self._prefetched.clear()
        for unit in self.policy.leaving(sorted(self.slot_of), self._needed):
            self._free.append(self.slot_of.pop(unit))

    def prefetch(self, units: Sequence[int]) -> list[Move]:
        """What has to be read so that the units that the next call may need are in slots; no more of them than there are slots."""
        units = list(units)[: self.slots]
        moves = self._take_slots([unit for unit in units if unit not in self.slot_of], pinned=units)
        self.counters.prefetches += len(moves)
        self._prefetched.update(move.unit for move in moves)
        return moves

    def preload(self, units: Sequence[int]) -> list[Move]:
        """Puts units into free slots before the first call. It is not counted."""
        return self._take_slots(units, pinned=units)

    def forget(self) -> None:
        """Empties all slots, after a read that failed: what is in them is not known."""
        self.slot_of.clear()
        self._prefetched.clear()
        self._free = list(range(self.slots - 1, -1, -1))

    def _take_slots(self, units: Sequence[int], *, pinned: Sequence[int]) -> list[Move]:
        moves = []
        for unit in units:
            slot = self._free.pop() if self._free else self._evict(pinned)
            if slot in self._touched:
                self.counters.replacements += 1
            self._touched.add(slot)
            self.slot_of[unit] = slot
            moves.append(Move(unit, slot))
        return moves

    def _evict(self, pinned: Sequence[int]) -> int:
        held = set(pinned)
        unit = self.policy.victim(sorted(unit for unit in self.slot_of if unit not in held))
        if unit in self._prefetched:
            self._prefetched.discard(unit)
            self.counters.prefetches_wasted += 1
        return self.slot_of.pop(unit)


def too_few(units: int, slots: int) -> OffloadError:
    """The error for more units than slots."""
    advice = "Raise expert_offload.slots, or expert_offload.memory."
    return OffloadError(f"{units} experts (or LoREs) of a layer are needed at once, but there are {slots} slots. {advice}")
