"""Traces as files of an analysis: what is given in place of a model, and what is kept of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.analysis.routing.blocks import Block, Pieces, Shape
from megatron.analysis.routing.saturation import Kept
from megatron.analysis.routing.tally import Origin
from megatron.monitor.foreign_traces import read_any_trace
from megatron.monitor.routing_trace import Trace, write_trace
from megatron.monitor.trace_parts import read_parts


def read_traces(path: Path, *, num_experts: int | None) -> Trace | None:
    """The trace of a file, or of a folder with the parts that the processes of a run wrote at one step. None: it is no trace.

    Raises TraceError.
    """
    if path.is_file():
        return read_any_trace(path, num_experts=num_experts)
    return read_parts(path, num_experts=num_experts)


class TraceKeeper:
    """Keeps the choices of the first tokens, or of all."""

    def __init__(self, most: int | None) -> None:
        """`most`: tokens to keep. None: all."""
        self._most, self._blocks, self._tokens = most, list[Block](), 0

    def add(self, block: Block) -> None:
        """Keeps the block if there is room."""
        if self._most is None or self._tokens < self._most:
            short = block if self._most is None else _cut(block, self._most - self._tokens)
            self._blocks.append(short)
            self._tokens += len(short.expert_TLK)

    def kept(self, origin: Origin, shape: Shape, most: int) -> Kept:
        """What saturation compares."""
        tokens = np.concatenate([np.zeros(0, np.int64), *(block.token_T for block in self._blocks if block.token_T is not None)])
        return Kept(origin.name, origin.iteration, shape.layers, shape.experts_L, tokens[:most], self._experts()[:most])

    def write(self, path: Path, shape: Shape, pieces: Pieces, name: str) -> None:
        """A file of ours, with everything that is kept. Raises TraceError."""
        blocks = self._blocks
        lengths = [len(block.expert_TLK) for block in blocks]
        numbers = np.cumsum([not block.continues for block in blocks]) - 1
        lores = [block.lore_TLKU for block in blocks if block.lore_TLKU is not None]
        weights = [block.weight_TLK for block in blocks if block.weight_TLK is not None]
        tokens = [block.token_T for block in blocks if block.token_T is not None]
        trace = Trace(
            np.repeat(np.arange(len(blocks)), lengths),
            list(shape.layers),
            self._experts(),
            shape.experts,
            np.concatenate(lores) if lores else None,
            shape.num_lores,
            np.concatenate(weights) if weights else None,
            token_T=np.concatenate(tokens) if tokens else None,
            sequence_T=np.repeat(numbers, lengths),
            domain_T=np.repeat([block.domain for block in blocks], lengths),
            domains=tuple(shape.domains),
            experts_L=list(shape.experts_L),
            pieces=pieces,
            model=name,
        )
        write_trace(path, trace)

    def _experts(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.concatenate([block.expert_TLK for block in self._blocks])


def _cut(block: Block, most: int) -> Block:
    return block._replace(
        expert_TLK=block.expert_TLK[:most].astype(np.int16 if block.expert_TLK.max(initial=0) < 1 << 15 else np.int32),
        weight_TLK=None,
        token_T=None if block.token_T is None else block.token_T[:most].copy(),
        lore_TLKU=None,
    )
