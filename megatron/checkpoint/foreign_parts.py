"""Which part of today's weight each tensor is that GPT-NeoX's tensor-parallel processes stored, under any name and in any order that it ever used.

The parts follow from `shards.RULES`, the old names from `names.py`, the old order of grouped queries from `gqa_layout.py`; here all of them become
one thing, a Cut, so that the optimizer's state can be read by it as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron.checkpoint.gqa_layout import FUSED
from megatron.checkpoint.names import GATE, PACKED, RENAMED, UP, is_derived, logical_name, one_name
from megatron.checkpoint.shards import Rule, rule_for
from megatron.model.division import Cut, Span

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class ForeignParts:
    """`shapes`: of every tensor of one tensor-parallel process, under the names that are stored. `count`: how many processes there are.

    `heads`: query heads of a process, needed where `per_head` says that grouped queries lie head by head.
    """

    def __init__(self, shapes: Shapes, count: int, *, heads: int, per_head: bool) -> None:
        self.count, self.heads, self.per_head = count, heads, per_head
        self._state = {name: torch.empty(shape, device="meta") for name, shape in _modern_shapes(shapes).items()}

    def part(self, stored_name: str, shape: Shape, process: int) -> tuple[str, Cut] | None:
        """Today's name, and the part of it that this tensor of a tensor-parallel process is. None: it is no weight. Raises CheckpointError."""
        name = todays_name(stored_name)
        if is_derived(name):
            return None
        half = name = one_name(name)
        name = name.replace(UP, PACKED).replace(GATE, PACKED)
        rule = rule_for(name) if self.count > 1 or half != name else Rule("", dim=None)
        if rule.dim is None:
            grouped = self.per_head and FUSED in name
            return name, (self._per_head(name, 0, 1) if grouped else Cut(shape, tuple((Span(0, size, process == 0),) for size in shape)))
        sizes = rule.parts(self._state, name) if rule.parts is not None else [self._state[name].shape[rule.dim]]
        if self.per_head and FUSED in name and len(sizes) == 3:
            return name, self._per_head(name, process, self.count)
        spans, offset = [], 0
        for size in sizes:
            spans.append(Span(offset + process * size, offset + (process + 1) * size))
            offset += size * self.count
        if half != name:
            spans = [spans[0 if UP in half else 1]]
        whole = (*shape[: rule.dim], offset, *shape[rule.dim + 1 :])
        return name, Cut(whole, tuple(tuple(spans) if dim == rule.dim else (Span(0, size),) for dim, size in enumerate(whole)))

    def is_copied(self, name: str) -> bool:
        """Whether every tensor-parallel process has a copy of a weight."""
        return self.count > 1 and rule_for(name).dim is None

    def is_added(self, name: str) -> bool:
        """Whether the copies are added up with parallel residuals."""
        return self.count > 1 and rule_for(name).added

    def _per_head(self, name: str, process: int, count: int) -> Cut:
        shape = tuple(self._state[name].shape)
        parts = rule_for(name).parts
        assert parts is not None
        sizes = parts(self._state, name)
        spans: list[Span] = []
        for head in range(self.heads):
            offset = 0
            for size in sizes:
                each, begin = size // self.heads, offset + process * size
                spans.append(Span(begin + head * each, begin + (head + 1) * each))
                offset += size * count
        whole = (shape[0] * count, *shape[1:])
        return Cut(whole, (tuple(spans), *((Span(0, size),) for size in whole[1:])))


def todays_name(stored_name: str) -> str:
    """The name of today but for gates, which have two names before they are packed."""
    name = logical_name(stored_name)
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def optimizer_orders(shapes: Shapes, buffers: Sequence[str]) -> list[dict[str, Shape]]:
    """The weights in the order of the optimizer's groups, by GPT-NeoX's rule: those that decay, then biases and norms; an empty group is left out."""
    weights = {name: shape for name, shape in shapes.items() if not is_derived(name) and name not in buffers}
    exempt = {name for name in weights if name.endswith((".bias", "_bias")) or "norm." in name[name.rfind(".", 0, name.rfind(".")) :]}
    groups = [{name: shape for name, shape in weights.items() if (name in exempt) == last} for last in (False, True)]
    return [group for group in groups if group]


def _modern_shapes(shapes: Shapes) -> dict[str, Shape]:
    modern: dict[str, Shape] = {}
    for stored_name, shape in shapes.items():
        name = todays_name(stored_name)
        if UP in name or GATE in name:
            modern[name.replace(UP, PACKED).replace(GATE, PACKED)] = (2 * shape[0], *shape[1:])
        else:
            modern[one_name(name)] = shape
    return modern
