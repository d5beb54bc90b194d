"""Experts that are computed where they rest, from a memory map, while the hottest ones are in slots (llama.cpp's placement; Fiddler moves no weights
either).

Shapes: R routed rows, sorted by expert; E experts; D model width.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.expert_places import Record
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.experts import Result, SlottedExperts, joined, places
from megatron.inference.offload.layer import LayerSlots
from megatron.inference.offload.simulate import count_in_place
from megatron.inference.offload.store import Store
from megatron.model.moe.routing import LoreRouting


class InPlaceExperts(SlottedExperts):
    """`pair`: the experts module for two experts, whose parameters are set to the map. One of the two gets no rows: with it, the products are those
    of several experts, and round as they do.
    """

    def __init__(self, slab: Any, slots: LayerSlots, num_experts: int, pair: Any, store: Store) -> None:
        super().__init__(slab, slots, num_experts)
        self.pair, self._store, self._maps = pair, store, dict[Path, mmap.mmap]()

    def acquire(self, expert_NK: Tensor, hidden_ND: Tensor) -> Tensor:
        """Raises OffloadError: the others are in no slot."""
        raise OffloadError("expert_offload.misses: in_place computes experts that are in no slot, so they have no slot number. Write misses: move.")

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting | None]:
        """(y_RD, the second routing), bit for bit those of the whole module. Raises OffloadError."""
        rows, table = rows_E.tolist(), self.slots.table
        needed = [expert for expert, count in enumerate(rows) if count]
        resident = count_in_place(table, needed)
        results = [self._compute(x_RD, rows, resident, [table.slot_of[expert] for expert in resident])] if resident or not needed else []
        results += [self._compute_in_place(x_RD, rows, expert) for expert in needed if expert not in table.slot_of]
        return joined(x_RD, results, self.num_experts)

    def _compute_in_place(self, x_RD: Tensor, rows: Sequence[int], expert: int) -> Result:
        record = self._store.places[self.slots.layer][expert]
        which = self._map(record)
        place_R = places(rows, [expert], x_RD.device)
        count_2 = torch.tensor([rows[expert] if number == which else 0 for number in range(2)])
        y_RD, lores = self.pair(x_RD.index_select(0, place_R), count_2)
        return Result(place_R, y_RD, lores, ((which, expert),))

    def _map(self, record: Record) -> int:
        """Sets the pair's parameters to the record; which of the two experts it is: the parts before or behind it belong to the file, too."""
        for place in record.values():
            self._store.files.at(place.file).check()  # a map of a file that was cut short ends the process
        sizes = {place.file: self._store.files.at(place.file).size for place in record.values()}
        which = 0 if all(place.offset + 2 * place.length <= sizes[place.file] for place in record.values()) else 1
        for name, place in record.items():
            parameter = self.pair.get_parameter(name)
            begin = place.offset - which * place.length
            if place.transposed or place.dtype != parameter.dtype or begin < 0 or begin % place.dtype.itemsize:
                raise OffloadError(
                    f"{place.file}: {name} of layer {self.slots.layer} is not stored as the model computes with it ({place.dtype}, "
                    f"{'transposed' if place.transposed else 'not aligned'}), so it cannot be computed in place. Write the experts with "
                    "tools/ckpts/pack_experts.py, or use misses: move."
                )
            pages = self._mapped(place.file)
            parameter.data = torch.frombuffer(pages, dtype=place.dtype, count=parameter.numel(), offset=begin).view(parameter.shape)
        return which

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_COPY)
        return self._maps[path]
