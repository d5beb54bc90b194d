"""An experts module whose experts are in S slots instead of E places; what is not in a slot is read into one when a router selects it.

Shapes: R routed rows, sorted by expert; N tokens; K experts per token; E experts; S slots; M LoREs per expert; D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.inference.offload.layer import LayerSlots
from megatron.inference.offload.table import too_few
from megatron.model.moe.routing import LoreRouting

MOST_ROWS_AHEAD = 256
"""With more rows than this in a call, most experts are needed and nothing is predicted for the next layer."""
Ahead = Callable[[Tensor], None]
"""Takes the rows of this layer, and begins to read for the next one."""


def nothing_ahead(hidden_ND: Tensor) -> None:
    """No prefetch."""


class Result(NamedTuple):
    """What one group of experts computed."""

    place_R: Tensor
    """Which of the call's rows these are."""
    y_RD: Tensor
    lores: LoreRouting | None
    """None: there is no second routing."""
    by_slot: tuple[tuple[int, int], ...]
    """(slot, expert), in the order of the rows."""


class SlottedExperts(nn.Module):
    """In place of a layer's `experts`. `slab` is a module of the same class for S experts: slot s is its expert s."""

    def __init__(self, slab: Any, slots: LayerSlots, num_experts: int) -> None:
        super().__init__()
        self.slab, self.slots, self.num_experts = slab, slots, num_experts
        self.num_lores = slab.num_lores // slab.num_experts * num_experts
        self.ahead: Ahead = nothing_ahead

    def acquire(self, expert_NK: Tensor, hidden_ND: Tensor) -> Tensor:
        """slot_NK: where the experts are, which stay there until the next call. Raises OffloadError, also for more experts than slots.

        `expert_NK`: int64, on the CPU; an empty place (number E) becomes number S of the slab. `hidden_ND`: what the router read, from which the next
        layer's experts are guessed.
        """
        units = expert_NK[expert_NK < self.num_experts].unique().tolist()
        if len(units) > self.slots.table.slots:
            raise too_few(len(units), self.slots.table.slots)
        self.slots.table.begin([[unit] for unit in units])
        slots = self.slots.fetch(units)
        self.slots.table.end()
        self.ahead(hidden_ND)
        slot_E = expert_NK.new_full((self.num_experts + 1,), self.slab.num_experts)
        slot_E[units] = slot_E.new_tensor(slots)
        return slot_E[expert_NK]

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> tuple[Tensor, LoreRouting | None]:
        """(y_RD, the second routing; None where there is none), bit for bit those of the whole module."""
        rows = rows_E.tolist()
        needed = [expert for expert, count in enumerate(rows) if count]
        results = []
        for number, group in enumerate(self.slots.table.begin([[expert] for expert in needed])):
            group = [needed[place] for place in group]
            slots = self.slots.fetch(group)
            if number == 0 and len(x_RD) <= MOST_ROWS_AHEAD:
                self.ahead(x_RD)
            results.append(self._compute(x_RD, rows, group, slots))
        self.slots.table.end()
        return joined(x_RD, results or [self._compute(x_RD, rows, (), ())], self.num_experts)

    def _compute(self, x_RD: Tensor, rows: Sequence[int], group: Sequence[int], slots: Sequence[int]) -> Result:
        by_slot = sorted(zip(slots, group, strict=True))
        place_R = places(rows, [expert for _, expert in by_slot], x_RD.device)
        count_S = [0] * self.slab.num_experts
        for slot, expert in by_slot:
            count_S[slot] = rows[expert]
        y_RD, lores = self.slab(x_RD.index_select(0, place_R), torch.tensor(count_S, device=x_RD.device))
        return Result(place_R, y_RD, lores, tuple(by_slot))


def places(rows: Sequence[int], experts: Sequence[int], device: torch.device) -> Tensor:
    """int64: the rows of these experts, one expert after the other, among rows sorted by expert."""
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    if not experts:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat([torch.arange(starts[expert], starts[expert] + rows[expert], device=device) for expert in experts])


def joined(x_RD: Tensor, results: Sequence[Result], num_experts: int) -> tuple[Tensor, LoreRouting | None]:
    """The groups' results in the order of the call's rows. There is at least one group; if it has no rows, it still says which LoREs there are."""
    y_RD = torch.empty_like(x_RD)
    for result in results:
        y_RD.index_copy_(0, result.place_R, result.y_RD)
    if results[0].lores is None:
        return y_RD, None
    return y_RD, _joined_lores(results, len(x_RD), num_experts)


def _joined_lores(results: Sequence[Result], rows: int, num_experts: int) -> LoreRouting:
    first = results[0].lores
    assert first is not None
    per_expert = first.logit_RM.shape[1]

    def by_row(name: str) -> Tensor:
        parts = [(result.place_R, getattr(result.lores, name)) for result in results]
        whole = parts[0][1].new_empty(rows, parts[0][1].shape[1])
        for place_R, part in parts:
            whole.index_copy_(0, place_R, part)
        return whole

    def by_expert(name: str) -> Tensor:
        sample = getattr(first, name)
        whole = sample.new_zeros(num_experts, per_expert)
        for result in results:
            part = getattr(result.lores, name).view(-1, per_expert)
            for slot, expert in result.by_slot:
                whole[expert] = part[slot]
        return whole

    total_EM = None if first.total_EM is None else by_expert("total_EM")
    rows_G = by_expert("rows_G").view(-1)
    return LoreRouting(by_row("lore_RL"), by_row("weight_RL"), by_row("probability_RM"), by_row("logit_RM"), rows_G, total_EM)
