"""All counts of one model together: blocks go in, a `findings.Model` comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.analysis.routing.blocks import Block, Pieces, Shape, View, Viewer
from megatron.analysis.routing.co_activation import CoActivationCount
from megatron.analysis.routing.findings import Model
from megatron.analysis.routing.load import LoadCount
from megatron.analysis.routing.locality import LocalityCount
from megatron.analysis.routing.lores import LoreCount
from megatron.analysis.routing.overload import OverloadCount, sizes
from megatron.analysis.routing.repeats import RepeatCount
from megatron.analysis.routing.samples import SampleKeeper
from megatron.analysis.routing.specialisation import TokenCount


@dataclass(frozen=True)
class Measures:
    """What is measured besides what always is."""

    windows: Sequence[int] = (4, 16, 64)
    """Lengths for SRP and SCH, in tokens."""
    slots: Sequence[int] | None = None
    """For SCH. None: 1, 2 and 4 times the experts of a token."""
    processes: Sequence[int] | None = None
    """Of expert parallelism. None: powers of two that divide the experts."""
    batch_tokens: int = 2048
    """Tokens that expert parallelism sends at once."""


@dataclass(frozen=True)
class Origin:
    """Where the routing comes from: entries of `findings.Model`."""

    name: str
    source: str
    kind: str
    iteration: int | None = None


class Count(Protocol):
    """Reads every block."""

    def add(self, view: View) -> None: ...


class Tally:
    """Counts blocks."""

    def __init__(self, shape: Shape, measures: Measures, occurrences: Mapping[int, int]) -> None:
        """`occurrences`: how often each token is in the text. Empty: the tokens are not known."""
        self.shape = shape
        slots = measures.slots or sorted({min(shape.experts, shape.top_k * times) for times in (1, 2, 4)})
        processes = sizes(shape) if measures.processes is None else measures.processes
        self._viewer = Viewer(shape, max([*measures.windows, 2]) - 1)
        self._load, self._repeats, self._pairs = LoadCount(shape), RepeatCount(shape), CoActivationCount(shape)
        self._locality = LocalityCount(shape, measures.windows, slots)
        self._overload = OverloadCount(shape, processes, batch_tokens=measures.batch_tokens)
        self._tokens = TokenCount(shape, occurrences)
        self._samples = SampleKeeper(shape)
        self._lores = LoreCount(shape) if shape.num_lores else None
        parts = (self._load, self._repeats, self._pairs, self._locality, self._overload, self._tokens, self._samples, self._lores)
        self._counts: list[Count] = [part for part in parts if part is not None]

    @property
    def sample_length(self) -> int:
        """Tokens of a sample."""
        return self._samples.length

    def add(self, block: Block) -> None:
        """Counts a block that is not empty."""
        view = self._viewer.view(block)
        for count in self._counts:
            count.add(view)

    def found(self, origin: Origin, pieces: Pieces, *, seconds: float = 0.0) -> Model:
        """Of all blocks so far, of which there is at least one."""
        shape, load = self.shape, self._load.found()
        tokens_G, used_L = shape.over_groups(self._load.tokens_D), self._repeats.used_per_token_L
        return Model(
            origin.name,
            origin.source,
            origin.kind,
            origin.iteration,
            [int(layer) for layer in shape.layers],
            [int(count) for count in shape.experts_L],
            shape.top_k,
            float(np.mean(used_L)),
            shape.groups,
            tokens_G,
            load,
            self._repeats.found(used_L),
            self._locality.found(),
            self._overload.found(),
            self._pairs.found(used_L),
            self._tokens.found(load, tokens_G, pieces),
            self._samples.found(pieces),
            None if self._lores is None else self._lores.found(),
            seconds,
        )
