"""LoRE-granular offload: the experts of StructMoE stay, with their second routers, and their LoREs move when a second router selects them.

The LoREs of a layer have an address each, but memory only while they are resident: a LoRE that leaves gives its pages back to the system. So the
kernels see the layer as it is, and S LoREs of it take memory. A moved LoRE is much smaller than an expert (26 times in the paper's 1.9B model).

Shapes: R routed rows, sorted by expert; E experts; M LoREs per expert; G = E*M; L LoREs per row; D model width.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.inference.offload.experts import MOST_ROWS_AHEAD, Ahead, Result, joined, nothing_ahead, places
from megatron.inference.offload.files import private_memory
from megatron.inference.offload.layer import LayerSlots
from megatron.inference.offload.store import Targets
from megatron.inference.offload.table import Move
from megatron.model.moe.routing import LoreRouting


class PagedMemory:
    """Parameters with an address for every unit, and memory for the resident ones. On a CPU only."""

    def __init__(self, module: nn.Module, names: Sequence[str], units: int) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._parts: dict[str, Sequence[Tensor]] = {}
        for name in names:
            parameter = module.get_parameter(name)
            pages = private_memory(max(1, parameter.nbytes))
            parameter.data = torch.frombuffer(pages, dtype=parameter.dtype).view(parameter.shape)
            self._maps[name], self._parts[name] = pages, parameter.data.chunk(units)

    def targets(self, move: Move) -> Targets:
        """The unit's own place, whatever its slot."""
        return {name: parts[move.unit] for name, parts in self._parts.items()}

    def release(self, unit: int) -> None:
        """Gives back the pages that belong to the unit alone."""
        for name, parts in self._parts.items():
            length = parts[unit].nbytes
            begin, end = -(-unit * length // mmap.PAGESIZE) * mmap.PAGESIZE, (unit + 1) * length // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                self._maps[name].madvise(mmap.MADV_DONTNEED, begin, end - begin)


class SlottedLores(nn.Module):
    """In place of a layer's `experts`: the same module, whose LoREs are read when they are selected."""

    def __init__(self, experts: Any, slots: LayerSlots) -> None:
        super().__init__()
        self.inner, self.slots = experts, slots
        self.num_experts, self.num_lores = experts.num_experts, experts.num_lores
        self.per_expert = self.num_lores // self.num_experts
        self.ahead: Ahead = nothing_ahead

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting | None]:
        """(y_RD, the second routing), bit for bit those of the whole module. Raises OffloadError."""
        choice, routing = self.inner.lores(x_RD, rows_E)
        rows = rows_E.tolist()
        blocks = self.needed(routing, rows)
        experts = sorted(blocks)
        groups = self.slots.table.begin([blocks[expert] for expert in experts])
        results = []
        for number, group in enumerate(groups):
            chosen = [experts[place] for place in group]
            self.slots.fetch([unit for expert in chosen for unit in blocks[expert]])
            if number == 0 and len(x_RD) <= MOST_ROWS_AHEAD:
                self.ahead(x_RD)
            if len(groups) > 1:
                results.append(self._compute(x_RD, rows, chosen))
        y_RD = None if results else self.inner.compute(x_RD, rows_E, choice)
        self.slots.table.end()
        return joined(x_RD, results, self.num_experts) if y_RD is None else (y_RD, routing)

    def _compute(self, x_RD: Tensor, rows: Sequence[int], chosen: Sequence[int]) -> Result:
        place_R = places(rows, chosen, x_RD.device)
        count_E = torch.tensor([count if expert in set(chosen) else 0 for expert, count in enumerate(rows)], device=x_RD.device)
        y_RD, lores = self.inner(x_RD.index_select(0, place_R), count_E)
        return Result(place_R, y_RD, lores, tuple((expert, expert) for expert in chosen))

    def needed(self, routing: LoreRouting, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Expert -> the LoREs that its rows need, by their numbers among all LoREs of the layer."""
        needed, begin = dict[int, list[int]](), 0
        for expert, count in enumerate(rows):
            if count:
                lores = routing.lore_RL[begin : begin + count].unique().tolist()
                needed[expert] = [expert * self.per_expert + lore for lore in lores]
            begin += count
        return needed
