"""The slots of one layer at work: the table says what moves, the reader moves it, and the computation waits for what it needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.inference.offload.counters import Counters
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.reader import Job, Reader
from megatron.inference.offload.store import Targets, Tier
from megatron.inference.offload.table import Move, SlotTable

Predict = Callable[[Tensor], Sequence[int]]
"""hidden_ND of the layer before -> the units that this layer's router would choose for it, the likeliest first."""


class Memory(Protocol):
    """Where units are while they are resident."""

    def targets(self, move: Move) -> Targets:
        """The parts of the parameters that a unit is read into."""
        ...

    def release(self, unit: int) -> None:
        """A unit that left its slot: its memory is needed no more."""
        ...


class SlabMemory:
    """S preallocated slots: the parts of the parameters of a module that was built for S units."""

    def __init__(self, slab: nn.Module, names: Sequence[str], slots: int) -> None:
        parts = {name: slab.get_parameter(name).data.chunk(slots) for name in names}
        self._targets = [{name: parts[name][slot] for name in names} for slot in range(slots)]

    def targets(self, move: Move) -> Targets:
        """The slot's parts."""
        return self._targets[move.slot]

    def release(self, unit: int) -> None:
        """Nothing: a slot is kept."""


class LayerSlots:
    """Slots, table and reads of one layer."""

    def __init__(self, layer: int, table: SlotTable, memory: Memory, tier: Tier, reader: Reader) -> None:
        self.layer, self.table = layer, table
        self._memory, self._tier, self._reader = memory, tier, reader
        self._reading: dict[int, Job] = {}
        self._held: dict[int, int] = {}
        """Slot -> the unit whose memory it keeps."""
        self._counting = threading.Lock()
        first = next(iter(memory.targets(Move(0, 0)).values()))
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None

    def fill(self, move: Move) -> None:
        """Reads a unit into a slot at once, whatever the slot holds: for measuring how long it takes."""
        self._fill(move, None)

    @property
    def counters(self) -> Counters:
        """What this layer did so far."""
        return self.table.counters

    def fetch(self, group: Sequence[int]) -> list[int]:
        """The slots of these units, which hold them when this returns and until the next call. Raises OffloadError."""
        try:
            for move in self.table.select(group):
                self._read(move, urgent=True)
            slots = [self.table.slot_of[unit] for unit in group]
            waiting = [self._reading[slot] for slot in slots if slot in self._reading]
            for job in waiting:
                self._reader.hurry(job)
            started = time.perf_counter()
            for job in waiting:
                job.wait()
            if waiting:
                self.counters.stall_seconds += time.perf_counter() - started
        except Exception:
            self._forget()
            raise
        for slot in slots:
            self._reading.pop(slot, None)
        return slots

    def prefetch(self, units: Sequence[int]) -> None:
        """Begins to read what the next call may need. Raises OffloadError where an earlier read failed."""
        try:
            for move in self.table.prefetch(units):
                self._read(move, urgent=False)
        except Exception:
            self._forget()
            raise

    def preload(self, units: Sequence[int]) -> None:
        """Reads units into slots before the first call."""
        for move in self.table.preload(units):
            self._read(move, urgent=True)
        for slot in list(self._reading):
            self._reading.pop(slot).wait()

    def _read(self, move: Move, *, urgent: bool) -> None:
        before = self._reading.pop(move.slot, None)
        if before is not None and not before.drop():
            before.wait()  # two reads into one slot would mix two units
        if (old := self._held.get(move.slot)) is not None and old not in self.table.slot_of:
            self._memory.release(old)
        self._held[move.slot] = move.unit
        event = None if self._stream is None else torch.cuda.current_stream().record_event()

        def work() -> None:
            self._fill(move, event)

        self._reading[move.slot] = self._reader.submit(work, urgent=urgent)

    def _fill(self, move: Move, event: torch.cuda.Event | None) -> None:
        targets = self._memory.targets(move)
        if self._stream is None:
            count = self._tier.read(self.layer, move.unit, targets)
        else:
            with torch.cuda.stream(self._stream):
                if event is not None:
                    self._stream.wait_event(event)  # the kernels that still read the slot's old unit
                count = self._tier.read(self.layer, move.unit, targets)
                self._stream.synchronize()
        with self._counting:
            self.counters.bytes += count
            self.counters.host_hits += count == 0

    def _forget(self) -> None:
        for job in self._reading.values():
            if not job.drop():
                try:
                    job.wait()
                except OffloadError:
                    continue  # the error that is on its way says why
        self._reading.clear()
        self.table.forget()
