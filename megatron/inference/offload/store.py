"""The slow tier: records of units in files, read into tensors."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint.expert_places import LayerPlaces, Place
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.files import WatchedFiles

Targets = Mapping[str, Tensor]
"""Parameter -> where a unit's part of it goes."""
Key = tuple[int, int]
"""(layer, unit)"""


class Tier(Protocol):
    """What units are read from."""

    def read(self, layer: int, unit: int, targets: Targets) -> int:
        """Fills the targets, and gives the bytes that were read from files: 0 where a tier above them had all. Any thread may call it. Raises
        OffloadError."""
        ...


class Store:
    """Units in files."""

    def __init__(self, places: Mapping[int, LayerPlaces], *, checksums: Mapping[Key, int] | None = None, direct: bool = True) -> None:
        """`checksums`: CRC-32 of each record, compared at its first read; None: there are none. `direct`: past the page cache."""
        self.places, self.files = places, WatchedFiles(direct=direct)
        self._checksums, self._verified = checksums or {}, set[Key]()
        for path in files_of(places):
            self.files.at(path)

    def read(self, layer: int, unit: int, targets: Targets) -> int:
        """Fills CPU tensors. Parts in another number format are converted."""
        record, sums = self.places[layer][unit], 0
        expected = self._checksums.get((layer, unit)) if (layer, unit) not in self._verified else None
        for name, place in record.items():
            sums = self._read_part(place, targets[name], sums if expected is not None else None)
        if expected is not None:
            if sums != expected:
                raise OffloadError(f"{place.file}: the record of layer {layer}, unit {unit} is damaged (its checksum differs). Write the file again.")
            self._verified.add((layer, unit))
        return sum(place.length for place in record.values())

    def _read_part(self, place: Place, target: Tensor, sums: int | None) -> int:
        file = self.files.at(place.file)
        as_stored = place.dtype == target.dtype and not place.transposed and target.is_contiguous()
        stored = target if as_stored else torch.empty(place.shape, dtype=place.dtype)
        view = memory_of(stored)
        file.read(place.offset, view)
        if not as_stored:
            target.copy_(stored.t() if place.transposed else stored.view(target.shape))
        return 0 if sums is None else zlib.crc32(view, sums)


class Throttled:
    """A tier that is not faster than a number of bytes a second, all threads together."""

    def __init__(self, below: Tier, bandwidth: int) -> None:
        self.below, self.bandwidth = below, bandwidth
        self._free_at = 0.0
        self._lock = threading.Lock()

    def read(self, layer: int, unit: int, targets: Targets) -> int:
        """Reads, and waits until so many bytes may have come."""
        size = sum(target.nbytes for target in targets.values())
        with self._lock:
            begun = max(self._free_at, time.perf_counter())
            self._free_at = ends = begun + size / self.bandwidth
        count = self.below.read(layer, unit, targets)
        time.sleep(max(0.0, ends - time.perf_counter()))
        return count


class HostTier:
    """A second tier in the host's memory: the records that were read last, up to a number of bytes; on a machine with a GPU in pinned memory."""

    def __init__(self, below: Tier, capacity: int, *, pinned: bool) -> None:
        self.below, self.capacity, self.pinned = below, capacity, pinned
        self._held: dict[Key, dict[str, Tensor]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def read(self, layer: int, unit: int, targets: Targets) -> int:
        """From memory where the record is there, else from below and into memory."""
        with self._lock:
            held = self._held.pop((layer, unit), None)
            if held is not None:
                self._held[layer, unit] = held  # the newest
        if held is not None:
            _copy(held, targets)
            return 0
        record = {name: torch.empty(target.shape, dtype=target.dtype, pin_memory=self.pinned) for name, target in targets.items()}
        count = self.below.read(layer, unit, record)
        _copy(record, targets)
        self._keep((layer, unit), record)
        return count

    def _keep(self, key: Key, record: dict[str, Tensor]) -> None:
        size = sum(part.nbytes for part in record.values())
        with self._lock:
            while self._held and self._size + size > self.capacity:
                oldest = self._held.pop(next(iter(self._held)))
                self._size -= sum(part.nbytes for part in oldest.values())
            if size <= self.capacity and key not in self._held:
                self._held[key] = record
                self._size += size


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to be read and written."""
    numbers: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def total_bytes(places: Mapping[int, LayerPlaces]) -> int:
    """All records together."""
    return sum(place.length for layer in places.values() for record in layer for place in record.values())


def files_of(places: Mapping[int, LayerPlaces]) -> list[Path]:
    """The files that hold them, each once."""
    return sorted({place.file for layer in places.values() for record in layer for place in record.values()})


def _copy(record: Targets, targets: Targets) -> None:
    for name, part in record.items():
        targets[name].copy_(part, non_blocking=True)
