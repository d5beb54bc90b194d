"""One layer as a few calls of decoding's kernels. A part that they do not serve is the model's own module.

Rows may belong to one text: its tokens then follow each other, and the newest come last.

Shapes: N rows; D model width; K experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.inference.offload.experts import SlottedExperts
from megatron.kernels.decode import compiled
from megatron.kernels.decode.interface import Input, Routed
from megatron.kernels.decode.reference import prepared
from megatron.model.attention import LayerCache
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.routing import Chosen
from megatron.model.positions import Places


@dataclass
class Rows:
    """What all layers are told about the rows of one call."""

    lengths: list[int]
    """Tokens before each row in its text."""
    rooms: list[int]
    """Positions of each row's cache."""
    caches: list[list[LayerCache]]
    """For each layer the cache of each row."""
    addresses: list[list[int]]
    """For each layer the addresses of each row's keys, then of its values."""
    threads: int
    chosen: list[Chosen] | None
    """Gets what each MoE layer chose. None: nobody asks."""


class Buffer:
    """float32 memory of one width for any number of rows, kept from call to call."""

    def __init__(self, width: int) -> None:
        self._memory = torch.empty(0, width)

    def __call__(self, rows: int) -> Tensor:
        """[rows, width], with any numbers in it."""
        if self._memory.shape[0] < rows:
            self._memory = torch.empty(rows, self._memory.shape[1])
        return self._memory[:rows]


class AttentionStep(Protocol):
    """Attention in two calls, because other parts of the layer may read `x_ND` between them."""

    def read(self, x_ND: Tensor, rows: Rows) -> None:
        """Everything up to the context, which is kept."""
        ...

    def add(self, y_ND: Tensor, rows: Rows) -> None:
        """y += the output."""
        ...


class CompiledAttention:
    """Three calls: the fused projection of the normed rows, attention, the output projection."""

    def __init__(self, fused: compiled.Linear, attention: compiled.Attention, dense: compiled.Linear, index: int) -> None:
        self.fused, self.attention, self.dense, self.index = fused, attention, dense, index
        layout = attention.part.layout
        self._fused, self._context = Buffer(fused.rows), Buffer(layout.heads * layout.head_dim)

    def read(self, x_ND: Tensor, rows: Rows) -> None:
        """See AttentionStep."""
        count = x_ND.shape[0]
        fused, context = self._fused(count), self._context(count)
        self.fused(x_ND, fused, rows.threads)
        self.attention(fused, context, rows.addresses[self.index], rows.lengths + rows.rooms, rows.threads)

    def add(self, y_ND: Tensor, rows: Rows) -> None:
        """See AttentionStep."""
        self.dense(self._context(y_ND.shape[0]), y_ND, rows.threads, add=True)


class ModuleAttention:
    """The model's own attention, row by row."""

    def __init__(self, norm: nn.Module, attention: nn.Module, index: int) -> None:
        self.norm, self.attention, self.index = norm, attention, index
        self.dtype = next(attention.parameters()).dtype
        self._outputs: list[Tensor] = []

    def read(self, x_ND: Tensor, rows: Rows) -> None:
        """See AttentionStep."""
        normed_ND = self.norm(x_ND.to(self.dtype))
        self._outputs = []
        for row_D, length, cache in zip(normed_ND, rows.lengths, rows.caches[self.index], strict=True):
            cache.length = length
            self._outputs.append(self.attention(row_D[None, None], Places(length), cache)[0, 0])

    def add(self, y_ND: Tensor, rows: Rows) -> None:
        """See AttentionStep."""
        y_ND += torch.stack(self._outputs)


FeedForward = Callable[[Tensor, Rows], None]
"""(x_ND, rows): x += the feed-forward part of x."""


class CompiledMLP:
    """A dense MLP: two calls."""

    def __init__(self, first: compiled.Linear, second: compiled.Linear) -> None:
        self.first, self.second = first, second
        self._hidden = Buffer(first.rows)

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """See FeedForward."""
        self.read(x_ND, rows)
        self.second(self._hidden(x_ND.shape[0]), x_ND, rows.threads, add=True)

    def read(self, x_ND: Tensor, rows: Rows) -> None:
        """The hidden layer, which is kept."""
        self.first(x_ND, self._hidden(x_ND.shape[0]), rows.threads)

    def add(self, y_ND: Tensor, rows: Rows, scale_N1: Tensor | None = None) -> None:
        """y += the output of what was read, times `scale_N1`. None: times 1."""
        if scale_N1 is None:
            self.second(self._hidden(y_ND.shape[0]), y_ND, rows.threads, add=True)
        else:
            output = torch.empty_like(y_ND)
            self.second(self._hidden(y_ND.shape[0]), output, rows.threads)
            y_ND.addcmul_(output, scale_N1)


class SharedMLP:
    """A shared expert. `gate`: the product whose sigmoid its output is multiplied by; None: there is none."""

    def __init__(self, mlp: CompiledMLP, gate: compiled.Linear | None) -> None:
        self.mlp, self.gate = mlp, gate
        self._scale: Tensor | None = None

    def read(self, x_ND: Tensor, rows: Rows) -> None:
        """Everything that depends on x."""
        self.mlp.read(x_ND, rows)
        if self.gate is not None:
            scale_N1 = torch.empty(x_ND.shape[0], 1)
            self.gate(x_ND, scale_N1, rows.threads)
            self._scale = scale_N1.sigmoid_()

    def add(self, y_ND: Tensor, rows: Rows) -> None:
        """y += the shared expert's output."""
        self.mlp.add(y_ND, rows, self._scale)


class CompiledExperts:
    """Router and experts in one call, with shared experts around it."""

    def __init__(self, experts: compiled.Experts, shared: Sequence[SharedMLP]) -> None:
        self.experts, self.shared = experts, shared
        self._routed: dict[int, Routed] = {}

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """See FeedForward."""
        for shared in self.shared:
            shared.read(x_ND, rows)
        routed = self._room(x_ND.shape[0])
        self.compute(x_ND, routed, rows)
        for shared in self.shared:
            shared.add(x_ND, rows)
        if rows.chosen is not None:
            rows.chosen.append(chosen_by(routed))

    def compute(self, x_ND: Tensor, routed: Routed, rows: Rows) -> None:
        """Chooses experts and adds their results to x."""
        self.experts(x_ND, x_ND, x_ND, routed, rows.threads)

    def _room(self, rows: int) -> Routed:
        if rows not in self._routed:
            self._routed[rows] = Routed.empty(self.experts.part, rows)
        return self._routed[rows]


class ModuleRouted(CompiledExperts):
    """The model's own router, then the experts in one call."""

    def __init__(self, experts: compiled.Experts, shared: Sequence[SharedMLP], router: nn.Module) -> None:
        super().__init__(experts, shared)
        self.router, self.dtype = router, next(router.parameters()).dtype

    def compute(self, x_ND: Tensor, routed: Routed, rows: Rows) -> None:
        """See CompiledExperts."""
        routing = self.router(prepared(self.experts.part.input, x_ND).to(self.dtype))
        routed.expert_Nk.copy_(routing.expert_TK)
        routed.weight_Nk.copy_(routing.weight_TK)
        self.experts.compute(x_ND, x_ND, x_ND, routed, rows.threads)


class OffloadedExperts(CompiledExperts):
    """Experts that are made resident between the router and the product. Rows that need more experts than there are slots go one after the other."""

    def __init__(self, experts: compiled.Experts, shared: Sequence[SharedMLP], slotted: SlottedExperts) -> None:
        super().__init__(experts, shared)
        self.slotted = slotted

    def compute(self, x_ND: Tensor, routed: Routed, rows: Rows) -> None:
        """See CompiledExperts."""
        self.experts.route(x_ND, routed, rows.threads)
        fits = x_ND.shape[0] == 1 or len(routed.expert_Nk.unique()) <= self.slotted.slots.table.slots
        for part in [slice(None)] if fits else [slice(n, n + 1) for n in range(x_ND.shape[0])]:
            own, x = Routed(*(t[part] for t in routed)), x_ND[part]
            slot_NK = self.slotted.acquire(own.expert_Nk, prepared(self.experts.part.input, x))
            self.experts.compute(x, x, x, own, rows.threads, slot_Nk=slot_NK)


def chosen_by(routed: Routed) -> Chosen:
    """The decisions, in memory of their own."""
    return Chosen(routed.expert_Nk.clone(), routed.weight_Nk.clone(), routed.lore_NkL.clone() if routed.lore_NkL.shape[-1] else None)


class ModuleFeedForward:
    """The model's own norm and feed-forward part."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        self.norm, self.mlp = norm, mlp
        self.dtype = next(mlp.parameters()).dtype

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """See FeedForward."""
        x_1ND = self.norm(x_ND.to(self.dtype))[None]
        if not isinstance(self.mlp, MoELayer):
            x_ND += self.mlp(x_1ND)[0]
            return
        output = self.mlp(x_1ND)
        if rows.chosen is not None:
            rows.chosen.append(output.decision.chosen())
        x_ND += output.y_BSD[0]


class Sequential:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: AttentionStep, feed_forward: FeedForward) -> None:
        self.attention, self.feed_forward = attention, feed_forward

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """x after this layer, in place."""
        self.attention.read(x_ND, rows)
        self.attention.add(x_ND, rows)
        self.feed_forward(x_ND, rows)


class Parallel(Sequential):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """x after this layer, in place."""
        self.attention.read(x_ND, rows)
        self.feed_forward(x_ND, rows)
        self.attention.add(x_ND, rows)


class Reordered(Sequential):
    """x + norm(attention(x)), then x + norm(mlp(x)). `norms`: attention's, the feed-forward part's."""

    def __init__(self, attention: AttentionStep, feed_forward: FeedForward, norms: tuple[Input, Input]) -> None:
        super().__init__(attention, feed_forward)
        self.norms = norms

    def __call__(self, x_ND: Tensor, rows: Rows) -> None:
        """x after this layer, in place."""
        change_ND = torch.zeros_like(x_ND)
        self.attention.read(x_ND, rows)
        self.attention.add(change_ND, rows)
        x_ND += prepared(self.norms[0], change_ND)
        change_ND = x_ND.clone()
        self.feed_forward(change_ND, rows)
        x_ND += prepared(self.norms[1], change_ND - x_ND)
